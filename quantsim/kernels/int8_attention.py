"""Attention whose every edge has 8 bits, in one kernel of integers (``attention.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantsim.kernels.build import library, why_not
from quantsim.kernels.edges import Grid, on_grid, to_integers
from quantsim.kernels.int8_matmul import LARGEST_AFFINE_SUM, scaled_matmul
from quantsim.numerics.reproducible import exp_table, softmax_on_grid

SOURCE = Path(__file__).with_name("attention.cpp")
DEPTHS = 16  # head dims are multiples of it
LARGEST_DEPTH = 256  # sums of the scores stay exact when they become floats


@dataclass(frozen=True)
class AttentionGrids:
    """The grids of an attention's edges, and what is done between them.

    Attributes:
        query, key, value, probabilities, context: stored in 8 bits.
        scores, scaled, masked: of what is on the way; ``None`` where there is no quantizer.
        factor: what the scores are multiplied by, or divided by where ``divides``.
    """

    query: Grid
    key: Grid
    value: Grid
    scores: Grid | None
    factor: float
    divides: bool
    scaled: Grid | None
    masked: Grid | None
    probabilities: Grid
    context: Grid


class Int8Attention(nn.Module):
    """``integers of softmax(quantized(scores) + mask) @ value``: one kernel from 8-bit queries, keys and values to the 8-bit context.

    Where ``masked`` is a grid, the result is to the bit that of :meth:`in_float32`. Without, ``exp`` is another than torch's, so that a
    probability, or a value of the context, may land one step off.

    Bits: a context is a sum of ``keys`` products of at most ``255 * 255``; more than 33,025 keys are refused.
    """

    numbers: Tensor

    def __init__(self, grids: AttentionGrids) -> None:
        super().__init__()
        self.grids = grids
        self.register_buffer("numbers", torch.tensor(list(_numbers(grids)), dtype=torch.float64), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[batch, heads, queries, depth]``, twice ``[batch, heads, keys, depth]``, and a mask that is added and broadcast."""
        out: Tensor = _attention(q, k, v, mask, self.numbers, self.grids.context.quant_min < 0)
        return out

    def in_float32(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same by torch's ops, as a lowered graph without this kernel has them."""
        g = self.grids
        x = scaled_matmul(q, k.transpose(-1, -2), g.query.zero_point, g.key.zero_point, g.query.scale * g.key.scale)
        x = x if g.scores is None else on_grid(x, *g.scores.numbers)
        x = x / g.factor if g.divides else x * g.factor
        x = x if g.scaled is None else on_grid(x, *g.scaled.numbers)
        x = x if mask is None else x + mask
        x = x if g.masked is None else on_grid(x, *g.masked.numbers)
        p = to_integers(x.softmax(-1) if g.masked is None else softmax_on_grid(x, g.masked.scale), *g.probabilities.numbers)
        y = scaled_matmul(p, v, g.probabilities.zero_point, g.value.zero_point, g.probabilities.scale * g.value.scale)
        return to_integers(y, *g.context.numbers)


@cache
def missing_for_attention() -> str:
    """Why the kernel doesn't run here; empty where it does. It is compiled and tried, not looked up."""
    if reason := why_not(_kernel):
        return reason
    grid, masked = Grid(1 / 32, 100, 0, 255), Grid(1 / 8, 128, 0, 255)
    attention = Int8Attention(AttentionGrids(grid, grid, grid, None, 0.25, False, None, masked, Grid(1 / 255, 0, 0, 255), grid))
    q, k, v = torch.randint(0, 256, (3, 1, 1, 20, DEPTHS), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    off = (attention(q, k, v).int() - attention.in_float32(q, k, v).int()).abs().max().item()
    return "" if off == 0 else f"attention.cpp computes other values here than torch: {off} steps apart"


# ---- the kernel ----


class _Grid(ctypes.Structure):
    _fields_ = [("on", ctypes.c_int32), ("scale", ctypes.c_float), ("low", ctypes.c_float), ("high", ctypes.c_float)]


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class _Arguments(ctypes.Structure):
    """``struct Attention`` of the source, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_at", _Strides) for name in ("q", "k", "v")),
        *((f"{name}_flip", ctypes.c_int32) for name in ("q", "k", "v")),
        *((f"{name}_zero", ctypes.c_int32) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "depth")),
        *((name, ctypes.c_float) for name in ("score_scale", "factor")),
        ("divides", ctypes.c_int32),
        *((name, _Grid) for name in ("scores", "scaled", "masked")),
        ("mask", ctypes.c_void_p),
        ("mask_at", _Strides),
        ("mask_key", ctypes.c_int64),
        ("exps", ctypes.c_void_p),
        ("probabilities", _Grid),
        ("p_zero", ctypes.c_int32),
        ("context_scale", ctypes.c_float),
        ("context", _Grid),
        ("context_zero", ctypes.c_int32),
        ("out", ctypes.c_void_p),
    ]


@cache
def _kernel() -> Any:
    kernel = library(SOURCE).attention
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Arguments)], None
    return kernel


def _numbers(grids: AttentionGrids) -> Iterator[float]:
    """The grids as plain numbers: a tensor of them is one input of the operator."""
    for grid in (grids.query, grids.key, grids.value, grids.scores, grids.scaled, grids.masked, grids.probabilities, grids.context):
        yield from (0.0, 0.0, 0.0, 0.0) if grid is None else grid.numbers
    yield from (grids.factor, float(grids.divides))


@cache
def _exps(scale: float) -> Tensor:
    return exp_table(scale)


def _low_high(numbers: list[float]) -> _Grid:
    scale, zero_point, quant_min, quant_max = numbers
    return _Grid(int(scale != 0), scale, quant_min - zero_point, quant_max - zero_point)


@torch.library.custom_op("quantsim::int8_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, numbers: Tensor, signed: bool) -> Tensor:
    batch, heads = torch.broadcast_shapes(q.shape[:2], k.shape[:2], v.shape[:2])  # type: ignore[no-untyped-call]
    q, k, v = (x.expand(batch, heads, -1, -1) if x.stride(-1) == 1 else x.contiguous().expand(batch, heads, -1, -1) for x in (q, k, v))
    queries, depth = q.shape[-2:]
    if k.shape[2] > LARGEST_AFFINE_SUM:
        raise ValueError(f"attention over {k.shape[2]} keys may overflow 32 bits; at most {LARGEST_AFFINE_SUM}")
    out = torch.empty(batch, queries, heads, depth, dtype=torch.int8 if signed else torch.uint8)
    if not out.numel():
        return out.transpose(1, 2)
    flat = numbers.tolist()
    grids = [flat[4 * i : 4 * i + 4] for i in range(8)]
    a = _Arguments(batch=batch, heads=heads, queries=queries, keys=k.shape[2], depth=depth, factor=flat[32], divides=int(flat[33]))
    for name, x, grid, wants in (("q", q, grids[0], torch.uint8), ("k", k, grids[1], torch.int8), ("v", v, grids[2], torch.int8)):
        setattr(a, name, x.data_ptr())
        setattr(a, f"{name}_at", _Strides(*x.stride()[:3]))
        other = x.dtype != wants
        setattr(a, f"{name}_flip", 0x80 * other)
        setattr(a, f"{name}_zero", int(grid[1]) + (0 if not other else 128 if wants == torch.uint8 else -128))
    a.score_scale, a.context_scale = grids[0][0] * grids[1][0], grids[6][0] * grids[2][0]
    a.scores, a.scaled, a.masked, a.probabilities, a.context = map(_low_high, grids[3:])
    if a.masked.on:
        a.exps = _exps(grids[5][0]).data_ptr()
    a.p_zero, a.context_zero = int(grids[6][1]), int(grids[7][1])
    if mask is not None:
        mask = mask.expand(batch, heads, queries, k.shape[2])
        mask = mask if mask.stride(-1) in (0, 1) else mask.contiguous()
        a.mask, a.mask_at, a.mask_key = mask.data_ptr(), _Strides(*mask.stride()[:3]), mask.stride(-1)
    a.out = out.data_ptr()
    _kernel()(ctypes.byref(a))
    return out.transpose(1, 2)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, numbers: Tensor, signed: bool) -> Tensor:
    batch, heads = torch.broadcast_shapes(q.shape[:2], k.shape[:2], v.shape[:2])  # type: ignore[no-untyped-call]
    queries, depth = q.shape[-2:]
    return torch.empty(batch, queries, heads, depth, dtype=torch.int8 if signed else torch.uint8, device=q.device).transpose(1, 2)
