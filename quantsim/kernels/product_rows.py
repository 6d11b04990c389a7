"""A product of 8-bit integers and what follows its rows, in one kernel (``product_rows.cpp``): its int32 sums never leave the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.amx import Matrix, matrix, missing_for_tiles
from quantsim.kernels.build import library, why_not
from quantsim.kernels.int8_matmul import LARGEST_SUM, int8_matmul
from quantsim.kernels.integer_rows import IntegerRows, Program, Step

SOURCE = Path(__file__).with_name("product_rows.cpp")
ROWS_OF_TILES = 32  # that a thread takes at a time


class ProductRows(IntegerRows):
    """``IntegerRows`` one of whose operands is :func:`int8_matmul` of the first two arguments; the same integers.

    Args:
        place: of the product among the operands of the program.
        kernel: of :func:`int8_matmul`, which takes the products that the tiles don't: those broadcast by other operands, and those of
            fewer rows than keep all threads at work.
    """

    def __init__(self, steps: Sequence[Step], constants: Sequence[Tensor], dtype: torch.dtype, place: int, kernel: bool) -> None:
        super().__init__(steps, constants, dtype)
        self.place, self.kernel = place, kernel

    def forward(self, a: Tensor, b: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        """int8 or uint8 ``[..., m, k]`` and int8 ``[..., k, width]`` or ``[k, width]``, and the other operands in their order.

        Raises:
            ValueError: other types, or another ``k`` on the right: the kernel would read past them.
        """
        batch = a.shape[:-2] if b.ndim == 2 else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        shape = torch.Size((*batch, a.shape[-2], b.shape[-1]))
        broadcast = torch.broadcast_shapes(shape, *(x.shape for x in others))  # type: ignore[no-untyped-call]
        few = shape[:-1].numel() < ROWS_OF_TILES * torch.get_num_threads()
        if a.shape[-1] != b.shape[-2] or a.dtype not in (torch.int8, torch.uint8) or b.dtype != torch.int8:
            raise ValueError(
                f"product of {list(a.shape)} ({a.dtype}) and {list(b.shape)} ({b.dtype}); expected int8 or uint8 and int8, "
                "and as many columns as rows"
            )
        if broadcast != shape or few or a.shape[-1] > LARGEST_SUM or not shape.numel():
            operands = list(others)
            operands.insert(self.place, int8_matmul(a, b, self.kernel))
            return super().forward(*operands)
        if b.ndim == 2:
            a = a.reshape(batch.numel() * a.shape[-2], a.shape[-1])  # one product of all rows
            batch = torch.Size()
        a, b = (x.expand(*batch, *x.shape[-2:]) for x in (a, b))
        a, b = (x if 1 in x.stride()[-2:] else x.contiguous() for x in (a, b))
        out = torch.empty(shape, dtype=self.dtype)
        program, _kept = self.program([*others[: self.place], None, *others[self.place :]], out)
        starts = [_starts(x) for x in (a, b)]
        argument = _ProductRows(
            a=matrix(_first(a), k_axis=1),
            b=matrix(_first(b), k_axis=0),
            batch=batch.numel(),
            a_at=starts[0].data_ptr(),
            b_at=starts[1].data_ptr(),
            a_unsigned=int(a.dtype == torch.uint8),
            place=self.place,
            rows=program,
        )
        if _kernel()(ctypes.byref(argument)):
            raise MemoryError(f"no memory to pack {list(a.shape)} and {list(b.shape)}")
        return out


def _first(x: Tensor) -> Tensor:
    return x[(0,) * (x.ndim - 2)]


def _starts(x: Tensor) -> Tensor:
    """Where each matrix of ``[..., m, n]`` begins, in elements: int64 ``[...]``, contiguous."""
    starts = torch.zeros(x.shape[:-2], dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(x.shape[:-2], x.stride()[:-2], strict=True)):
        starts += (torch.arange(size) * stride).reshape(-1, *(1,) * (x.ndim - 3 - axis))
    return starts


@cache
def missing_for_product_rows() -> str:
    """Why the kernel doesn't run here; empty where it does."""
    return missing_for_tiles() or why_not(_kernel)


class _ProductRows(ctypes.Structure):
    """``struct ProductRows`` of the source, field for field."""

    _fields_ = [
        ("a", Matrix),
        ("b", Matrix),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a_at", "b_at")),
        *((name, ctypes.c_int32) for name in ("a_unsigned", "place")),
        ("rows", Program),
    ]


@cache
def _kernel() -> Any:
    kernel = library(SOURCE).product_rows
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_ProductRows)], ctypes.c_int32
    return kernel
