"""The mapping to dynamic fixed point (``numerics.fixed_point``) in two passes over memory (``mapping.cpp``): the same mantissas."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import BuildError, library
from quantsim.numerics import fixed_point
from quantsim.numerics.fixed_point import FixedPoint, exponent_for, limit_of, mantissa_dtype

SOURCE = Path(__file__).with_name("mapping.cpp")


@cache
def missing_for_mapping() -> str:
    """Why the kernels don't run here; empty where they do."""
    try:
        _kernels()
    except BuildError as error:
        return str(error)
    return ""


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
    if exponent is None:
        exponent = shared_exponent(flat, bits, what)
    out = torch.empty(x.shape, dtype=mantissa_dtype(bits))
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
    _kernels().map(ctypes.byref(argument))
    return FixedPoint(out, exponent, bits)


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


@cache
def _kernels() -> Any:
    found = library(SOURCE)
    found.largest.argtypes, found.largest.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_float
    found.map.argtypes, found.map.restype = [ctypes.POINTER(_Mapping)], None
    return found
