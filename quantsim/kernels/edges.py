"""Edges of a lowered graph, stored as 8-bit integers: plain functions, so that a compiler can fuse them with what is around.

Same arithmetic as ``quantsim.numerics.affine.fake_quantize``, operation for operation: ``from_integers(to_integers(x))`` is
its result to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsim.numerics.affine import AffineParams

EDGE, GRID, COMPUTES, SHAPE = "edge", "grid", "computes", "shape"
"""What a lowered graph's nodes carry in ``meta``: the quantized edge that they give, its grid, the edge that they compute, and the shape
of integers that were moved."""

FUNCTIONS = frozenset("gelu tanh sigmoid silu relu erf exp hardswish hardtanh leaky_relu elu mish softplus".split())
"""Functions of each element alone that cost more than a look-up."""


@dataclass(frozen=True)
class Grid:
    """The quantization of an edge with one range, as plain numbers.

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``, stored as ``dtype``.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    @classmethod
    def of(cls, params: AffineParams) -> Grid:
        return cls(float(params.scale), int(params.zero_point), params.quant_min, params.quant_max)

    @property
    def dtype(self) -> torch.dtype:
        """``int8`` for a symmetric grid, else ``uint8``."""
        return torch.int8 if self.quant_min < 0 else torch.uint8

    def values(self, device: torch.device | None = None) -> Tensor:
        """Every value of the grid, from the least on, in float32."""
        every = torch.arange(self.quant_min, self.quant_max + 1, dtype=torch.int32, device=device).to(self.dtype)
        return from_integers(every, self.scale, self.zero_point)

    @property
    def numbers(self) -> tuple[float, int, int, int]:
        """As the arguments of :func:`to_integers` after the tensor."""
        return self.scale, self.zero_point, self.quant_min, self.quant_max


def to_integers(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``clamp(round(x / scale) + zero_point, quant_min, quant_max)`` as ``uint8``, or ``int8`` where ``quant_min`` is negative.

    >>> to_integers(torch.tensor([-1.0, 0.0, 0.3, 9.0]), 0.1, 2, 0, 255)
    tensor([ 0,  2,  5, 92], dtype=torch.uint8)
    """
    y = torch.div(x, scale).round_().clamp_(quant_min - zero_point, quant_max - zero_point)  # type: ignore[arg-type]  # numbers, or tensors
    return y.add_(zero_point).to(torch.int8 if quant_min < 0 else torch.uint8)


def from_integers(q: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """``(q - zero_point) * scale`` in float32."""
    return q.float().sub_(zero_point).mul_(scale)


def from_own_range(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """:func:`from_integers` of a tensor that brings its scale and zero point along, ``[]``; another node of a lowered graph."""
    return from_integers(q, scale, zero_point)


def rows_from_integers(q: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    """``q * scales[ids]``: looked-up rows ``[..., width]`` of an embedding in which each row has a scale of its own (``[rows]``)."""
    return q.float().mul_(scales[ids].unsqueeze(-1))


def on_grid(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """``from_integers(to_integers(x))`` without the integers, for an edge that only floating-point ops read."""
    return torch.div(x, scale).round_().clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale)


def look_up(q: Tensor, table: Tensor, quant_min: int) -> Tensor:
    """``table[q - quant_min]``: any function of an 8-bit edge, worked out once for each of its values."""
    index = q.int() if quant_min == 0 else q.int() - quant_min
    return table[index]
