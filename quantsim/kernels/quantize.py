"""Values to the integers of an 8-bit edge, where they are numbers: one pass over memory (``quantize.cpp``), or torch's ops."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import library, why_not
from quantsim.kernels.edges import Grid, to_integers

SOURCE = Path(__file__).with_name("quantize.cpp")


@cache
def missing_for_quantize() -> str:
    """Why the kernel doesn't run here; empty where it does."""
    return why_not(_kernel)


def finite_to_integers(x: Tensor, grid: Grid) -> Tensor | None:
    """:func:`to_integers` of float32 values, or ``None`` where one of them is NaN or infinite: no integer says so."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or missing_for_quantize():
        return to_integers(x, *grid.numbers) if is_finite(x) else None
    x = x.detach().contiguous()
    out = torch.empty(x.shape, dtype=grid.dtype)
    low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
    signed = int(grid.quant_min < 0)
    wrong = _kernel()(x.data_ptr(), x.numel(), grid.scale, low, high, grid.zero_point, signed, out.data_ptr())
    return None if wrong else out


def is_finite(x: Tensor) -> bool:
    """No NaN and no infinity: by the sum, one pass (of magnitudes that add up to less than a float32's largest)."""
    return bool(x.detach().sum().isfinite())


@cache
def _kernel() -> Any:
    kernel = library(SOURCE).to_integers
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kernel.argtypes, kernel.restype = [pointer, number, real, real, real, real, ctypes.c_int32, pointer], ctypes.c_int32
    return kernel
