"""The mapping to dynamic fixed point (``numerics.fixed_point``) in two passes over memory (``mapping.cpp``): the same mantissas."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import library, why_not
from quantsim.numerics import fixed_point
from quantsim.numerics.fixed_point import FixedPoint, check_bits, check_matrix, exponent_for, limit_of, mantissa_dtype

SOURCE = Path(__file__).with_name("mapping.cpp")


@cache
def missing_for_mapping() -> str:
    """Why the kernels don't run here; empty where they do."""
    return why_not(_kernels)


def shared_exponent(x: Tensor, bits: int, what: str = "tensor") -> int:
    """``numerics.fixed_point.shared_exponent``, on the kernel where there is one."""
    if not _on_kernel(x):
        return fixed_point.shared_exponent(x, bits, what)
    flat = _flat(x)
    largest = float(_kernels().largest(flat.data_ptr(), flat.numel()))
    return exponent_for(largest, bits, what) if math.isfinite(largest) else fixed_point.shared_exponent(x, bits, what)


def to_fixed_point(
    x: Tensor, bits: int, stream: tuple[int, int] | None = None, *, exponent: int | None = None, what: str = "tensor"
) -> FixedPoint:
    """``numerics.fixed_point.to_fixed_point``, on the kernels where there are some: the same arguments, mantissas and errors."""
    if not _on_kernel(x):
        return fixed_point.to_fixed_point(x, bits, stream, exponent=exponent, what=what)
    flat = _flat(x)
    found = shared_exponent(flat, bits, what)  # looks for NaN and infinity, too
    exponent = found if exponent is None else exponent
    out = torch.empty(x.shape, dtype=mantissa_dtype(bits), device=x.device)
    _kernels().map(ctypes.byref(_mapping(flat, out, bits, stream, exponent)))
    return FixedPoint(out, exponent, bits)


def to_fixed_point_by(
    axis: int, x: Tensor, bits: int, stream: tuple[int, int] | None = None, *, times: Tensor | None = None, what: str = "tensor"
) -> FixedPoint:
    """``numerics.fixed_point.to_fixed_point_by``, on the kernels where there are some: the same arguments, mantissas and errors."""
    check_bits(bits, what)
    check_matrix(axis, x, times, what)
    if _on_kernel(x):
        flat, shape = _flat(x), (len(x), 1) if axis == 0 else (1, x.shape[1])
        exponents = torch.empty(shape, dtype=torch.int32, device=x.device)
        out = torch.empty(x.shape, dtype=mantissa_dtype(bits), device=x.device)
        argument = _ByAxis(all=_mapping(flat, out, bits, stream), rows=x.shape[0], columns=x.shape[1], axis=axis, bits=bits)
        times = None if times is None else times.contiguous()
        argument.times, argument.exponents = None if times is None else times.data_ptr(), exponents.data_ptr()
        if not _kernels().map_by_axis(ctypes.byref(argument)):
            return FixedPoint(out, exponents, bits)
    return fixed_point.to_fixed_point_by(axis, x, bits, stream, times=times, what=what)


def sum_scaled_rows(g: FixedPoint) -> Tensor:
    """The rows of a matrix whose rows have exponents, added up in float64: ``[n, m] -> [m]``.

    The order of additions is the kernel's or torch's: exact, and so the same, where rows are less than ``2**22`` apart.

    Raises:
        ValueError: other exponents than ``[n, 1]``.
    """
    if not isinstance(g.exponent, Tensor) or g.exponent.shape != (len(g.mantissa), 1):
        given = list(g.exponent.shape) if isinstance(g.exponent, Tensor) else "one of all"
        raise ValueError(f"exponents: {given}; expected one of each row, [{len(g.mantissa)}, 1]")
    if not _on_kernel(g.mantissa):
        return (g.mantissa.double() * fixed_point.power_of_two(g.exponent, torch.float64)).sum(0)
    m, exponents = g.mantissa.contiguous(), g.exponent.contiguous()
    out = torch.empty(m.shape[1], dtype=torch.float64, device=m.device)
    _kernels().sum_rows_scaled(m.data_ptr(), m.element_size(), *m.shape, exponents.data_ptr(), out.data_ptr())
    return out


def _mapping(flat: Tensor, out: Tensor, bits: int, stream: tuple[int, int] | None, exponent: int = 0) -> _Mapping:
    argument = _Mapping(
        x=flat.data_ptr(),
        n=flat.numel(),
        inverse_step=math.ldexp(1.0, -exponent),
        limit=limit_of(bits),
        bytes=out.element_size(),
        stochastic=int(stream is not None),
        out=out.data_ptr(),
    )
    argument.keys = (ctypes.c_uint32 * 2)(*(key % 2**32 for key in stream or (0, 0)))
    return argument


def _on_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and 0 < x.numel() < 2**31 and not missing_for_mapping()


def _flat(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


class _Mapping(ctypes.Structure):
    """``struct Mapping`` of the source, field for field."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("inverse_step", "limit")),
        *((name, ctypes.c_int32) for name in ("bytes", "stochastic")),
        ("keys", ctypes.c_uint32 * 2),
        ("out", ctypes.c_void_p),
    ]


class _ByAxis(ctypes.Structure):
    """``struct ByAxis`` of the source, field for field."""

    _fields_ = [
        ("all", _Mapping),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("times", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("axis", "bits")),
        ("exponents", ctypes.c_void_p),
    ]


@cache
def _kernels() -> Any:
    found = library(SOURCE)
    found.largest.argtypes, found.largest.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_float
    found.map.argtypes, found.map.restype = [ctypes.POINTER(_Mapping)], None
    found.map_by_axis.argtypes, found.map_by_axis.restype = [ctypes.POINTER(_ByAxis)], ctypes.c_int32
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.sum_rows_scaled.argtypes, found.sum_rows_scaled.restype = [pointer, ctypes.c_int32, number, number, pointer, pointer], None
    return found
