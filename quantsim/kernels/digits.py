"""Products of 9 to 16 bits by int8 digits (``kernels.integer_matmul``): cutting them, and putting products together (``digits.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import library, why_not

SOURCE = Path(__file__).with_name("digits.cpp")


@cache
def missing_for_digits() -> str:
    """Why the kernels don't run here; empty where they do."""
    return why_not(_kernels)


def cut(m: Tensor, sixteen: bool) -> tuple[Tensor, Tensor]:
    """int16 ``[n, k]``, or the transpose of such a tensor → low and high digits, int8 of the same strides.

    ``m = 256 * high + low``, and ``+ 128`` where it has ``sixteen`` bits.
    """
    m = _dense(m)
    low, high = torch.empty_like(m, dtype=torch.int8), torch.empty_like(m, dtype=torch.int8)
    _kernels().cut(m.data_ptr(), m.numel(), int(sixteen), low.data_ptr(), high.data_ptr())
    return low, high


def sums(m: Tensor, dim: int, times: int = 1, plus: int = 0) -> Tensor:
    """``times * m.sum(dim) + plus`` of int8 or int16 ``[n, k]``, as int64."""
    m = _dense(m)
    transposed = not m.is_contiguous()
    rows, columns = (m.shape[1], m.shape[0]) if transposed else m.shape
    out = torch.empty(m.shape[1 - dim], dtype=torch.int64)
    kernel = _kernels().sum_columns if (dim == 1) != transposed else _kernels().sum_rows
    kernel(m.data_ptr(), m.element_size(), rows, columns, times, plus, out.data_ptr())
    return out


def together(
    products: Sequence[tuple[Tensor, int]],
    rows: Tensor | None,
    columns: Tensor | None,
    factors: tuple[float, float],
    bias: Tensor | None = None,
) -> Tensor:
    """``float32(sum_i products_i * 2**shift_i + rows[:, None] + columns) * factors[0] * factors[1] + bias``: rounded once, then scaled.

    Args:
        products: at most four of int32 ``[n, m]``, each with its shift.
        rows, columns: int64 ``[n]`` and ``[m]``.
        bias: float32 ``[m]``.
    """
    n, m = products[0][0].shape
    out = torch.empty(n, m, dtype=torch.float32, device=products[0][0].device)
    if not out.numel():
        return out
    kept = [x.contiguous() for x, _ in products]
    bias = None if bias is None else bias.contiguous()
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: {list(bias.shape)}; expected [{m}]")
    argument = _Together(count=len(kept), n=n, m=m, out=out.data_ptr(), factors=factors)
    argument.products = (ctypes.c_void_p * 4)(*(x.data_ptr() for x in kept))
    argument.shifts = (ctypes.c_int32 * 4)(*(shift for _, shift in products))
    argument.rows, argument.columns, argument.bias = (None if x is None else x.data_ptr() for x in (rows, columns, bias))
    _kernels().together(ctypes.byref(argument))
    return out


def _dense(m: Tensor) -> Tensor:
    return m if m.is_contiguous() or m.t().is_contiguous() else m.contiguous()


class _Together(ctypes.Structure):
    """``struct Together`` of the source, field for field."""

    _fields_ = [
        ("products", ctypes.c_void_p * 4),
        ("shifts", ctypes.c_int32 * 4),
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
        ("factors", ctypes.c_float * 2),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "m")),
        ("out", ctypes.c_void_p),
    ]


@cache
def _kernels() -> Any:
    found = library(SOURCE)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.cut.argtypes = [pointer, number, ctypes.c_int32, pointer, pointer]
    for kernel in (found.sum_rows, found.sum_columns):
        kernel.argtypes = [pointer, ctypes.c_int32, *[number] * 4, pointer]
    found.together.argtypes = [ctypes.POINTER(_Together)]
    for kernel in (found.cut, found.sum_rows, found.sum_columns, found.together):
        kernel.restype = None
    return found
