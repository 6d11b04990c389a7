"""Products of integers of up to 16 bits on AMX tiles (``amx.cpp``): cut into digits, multiplied, put together and mapped back at once.

Bits: a sum over ``k`` of two unsigned digits is at most ``k * 255**2``, below ``2**31`` for ``k`` up to ``LARGEST_K``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import library, why_not

SOURCE = Path(__file__).with_name("amx.cpp")
LARGEST_K = (2**31 - 1) // 255**2


@cache
def missing_for_tiles() -> str:
    """Why the kernel doesn't run here; empty where it does."""
    return why_not(_kernels) or ("" if _kernels().tiles_are_lent() == 0 else "the system does not lend AMX tiles")


def product(
    a: Tensor,
    b: Tensor,
    factors: tuple[float, float],
    bias: Tensor | None = None,
    row_exponents: Tensor | None = None,
    column_exponents: Tensor | None = None,
) -> Tensor:
    """``float32(a @ b) * 2**(row_exponents + column_exponents) * factors[0] * factors[1] + bias``.

    The sum is exact and rounded once, then scaled.

    Args:
        a: int8 or int16 ``[n, k]``, or the transpose of such a tensor; ``k`` up to ``LARGEST_K``.
        b: ``[k, m]``, the same.
        bias: float32 ``[m]``.
        row_exponents, column_exponents: int32 ``[n, 1]`` and ``[1, m]``.
    """
    (n, k), m = a.shape, b.shape[1]
    a = a if 1 in a.stride() else a.contiguous()
    b = b if 1 in b.stride() else b.contiguous()
    vectors = [None if x is None else x.contiguous() for x in (row_exponents, column_exponents, bias)]
    out = torch.empty(n, m)
    if out.numel():
        argument = _Product(_operand(a, k_axis=1), _operand(b, k_axis=0), _Output(out.data_ptr(), n, m, factors))
        for name, x in zip(("row_exponents", "column_exponents", "bias"), vectors, strict=True):
            setattr(argument.to, name, None if x is None else x.data_ptr())
        if _kernels().product(ctypes.byref(argument)):
            raise MemoryError(f"no memory to pack [{n}, {k}] and [{k}, {m}]")
    return out


class _Operand(ctypes.Structure):
    """``struct Operand`` of the source, field for field."""

    _fields_ = [
        ("m", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "k", "row")),
        *((name, ctypes.c_int32) for name in ("bytes", "k_inside")),
    ]


class _Output(ctypes.Structure):
    """``struct Output`` of the source, field for field."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "m")),
        ("factors", ctypes.c_float * 2),
        *((name, ctypes.c_void_p) for name in ("row_exponents", "column_exponents", "bias")),
    ]


class _Product(ctypes.Structure):
    """``struct Product`` of the source, field for field."""

    _fields_ = [("a", _Operand), ("b", _Operand), ("to", _Output)]


def _operand(x: Tensor, k_axis: int) -> _Operand:
    k_inside = x.stride(k_axis) == 1
    row = x.stride(1 - k_axis if k_inside else k_axis)
    return _Operand(x.data_ptr(), x.shape[1 - k_axis], x.shape[k_axis], row, x.element_size(), int(k_inside))


@cache
def _kernels() -> Any:
    found = library(SOURCE)
    found.tiles_are_lent.argtypes, found.tiles_are_lent.restype = [], ctypes.c_int64
    found.product.argtypes, found.product.restype = [ctypes.POINTER(_Product)], ctypes.c_int32
    return found
