"""Products of integers of up to 16 bits on AMX tiles (``amx.cpp``): cut into digits, multiplied, put together and mapped back at once.

Bits: a sum over ``k`` of two unsigned digits is at most ``k * 255**2``, below ``2**31`` for ``k`` up to ``LARGEST_K``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
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


def product(a: Tensor, b: Tensor, a_exponent: int | Tensor, b_exponent: int | Tensor, bias: Tensor | None = None) -> Tensor:
    """``float32(a @ b) * 2**(a_exponent + b_exponent) + bias``: the exact sum, rounded once, then scaled.

    Args:
        a: int8 or int16 ``[n, k]`` of any strides; ``k`` up to ``LARGEST_K``.
        b: ``[k, m]``, the same.
        a_exponent, b_exponent: of all, or int32 ``[n, 1]`` and ``[1, m]``.
        bias: float32 ``[m]``.

    Raises:
        ValueError: operands of other types, or shapes that don't fit each other: the kernel would read past them.
    """
    (n, k), m = a.shape, b.shape[1]
    vectors = {"row_exponents": a_exponent, "column_exponents": b_exponent, "bias": bias}
    kept = {name: x.contiguous() for name, x in vectors.items() if isinstance(x, Tensor)}
    _check(a, b, kept)
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    out = torch.empty(n, m, dtype=torch.float32, device=a.device)
    if out.numel():
        exponent = sum(x for x in (a_exponent, b_exponent) if isinstance(x, int))
        output = _Output(out=out.data_ptr(), n=n, m=m, exponent=exponent, **{name: x.data_ptr() for name, x in kept.items()})
        argument = _Product(matrix(a, k_axis=1), matrix(b, k_axis=0), output)
        if _kernels().product(ctypes.byref(argument)):
            raise MemoryError(f"no memory to pack [{n}, {k}] and [{k}, {m}]")
    return out


def _check(a: Tensor, b: Tensor, vectors: Mapping[str, Tensor]) -> None:
    n, m = len(a), b.shape[1]
    expected = {"row_exponents": ((n, 1), torch.int32), "column_exponents": ((1, m), torch.int32), "bias": ((m,), torch.float32)}
    for name, x in vectors.items():
        if (tuple(x.shape), x.dtype) != expected[name]:
            raise ValueError(f"{name}: {list(x.shape)} of {x.dtype}; expected {list(expected[name][0])} of {expected[name][1]}")
    if a.shape[1] != b.shape[0] or a.shape[1] > LARGEST_K or not {a.dtype, b.dtype} <= {torch.int8, torch.int16}:
        raise ValueError(
            f"product of {list(a.shape)} ({a.dtype}) and {list(b.shape)} ({b.dtype}); expected int8 or int16, "
            f"and as many columns as rows, at most {LARGEST_K}"
        )


class Matrix(ctypes.Structure):
    """``struct Matrix`` of ``tiles.h``, field for field."""

    _fields_ = [
        ("m", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "k", "row")),
        *((name, ctypes.c_int32) for name in ("bytes", "k_inside")),
    ]


class _Output(ctypes.Structure):
    """``struct Output`` of the source, field for field."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "m", "exponent")),
        *((name, ctypes.c_void_p) for name in ("row_exponents", "column_exponents", "bias")),
    ]


class _Product(ctypes.Structure):
    """``struct Product`` of the source, field for field."""

    _fields_ = [("a", Matrix), ("b", Matrix), ("to", _Output)]


def matrix(x: Tensor, k_axis: int) -> Matrix:
    """Of integers of 8 or 16 bits ``[rows, columns]``, one of whose axes is contiguous; the sum goes along ``k_axis``."""
    k_inside = x.stride(k_axis) == 1
    row = x.stride(1 - k_axis if k_inside else k_axis)
    return Matrix(x.data_ptr(), x.shape[1 - k_axis], x.shape[k_axis], row, x.element_size(), int(k_inside))


@cache
def _kernels() -> Any:
    found = library(SOURCE)
    found.tiles_are_lent.argtypes, found.tiles_are_lent.restype = [], ctypes.c_int64
    found.product.argtypes, found.product.restype = [ctypes.POINTER(_Product)], ctypes.c_int32
    return found
