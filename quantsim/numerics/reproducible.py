"""Functions whose float32 result does not depend on the order of a sum, and so neither on threads nor on the library.

Sums run in float64: their order moves a result by some 1e-16 of the terms, which shows in float32 only where a value lies that near to a
tie of rounding. ``exp`` is read from a table, for libraries differ in its last bit. Ours; no paper is behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = 256
"""How many values an 8-bit edge has, and so how many differences from its largest."""

IN_CACHE = 2**17
"""Values that are worked on at a time: what is between two passes over them stays in the cache, and its memory is used again."""


def exp_table(scale: Tensor | float, device: torch.device | None = None) -> Tensor:
    """``exp(-i * scale)`` for ``i`` in 0 … 255: float32 ``[256]``, each entry rounded once from float64.

    >>> exp_table(0.5)[:3]
    tensor([1.0000, 0.6065, 0.3679])
    """
    steps = torch.arange(STEPS, dtype=torch.float64, device=device)
    return torch.exp(-steps * scale).float()


@torch.no_grad()
def softmax_on_grid(x: Tensor, scale: Tensor | float) -> Tensor:
    """Softmax over the last axis of values that are whole multiples of ``scale``, at most 255 steps apart.

    With ``d = (max(x) - x) / scale``, an integer::

        y = table[d] / float32(sum(table[d])),  table = exp_table(scale),  the sum in float64

    A row that holds NaN is NaN. It has no gradient.

    >>> softmax_on_grid(torch.tensor([0.5, 0.0, -0.5]), 0.5)
    tensor([0.5065, 0.3072, 0.1863])
    """
    table = exp_table(scale, x.device)
    return _by_rows(lambda rows: _softmax(rows, scale, table), x, 1)


def _softmax(x: Tensor, scale: Tensor | float, table: Tensor) -> Tensor:
    largest = x.amax(-1, keepdim=True)
    steps = torch.sub(largest, x).div_(scale).round_().int().clamp_(0, STEPS - 1)  # of NaN, some number
    y = torch.index_select(table, 0, steps.reshape(-1)).reshape(x.shape)
    total = y.sum(-1, keepdim=True, dtype=torch.float64).float()
    return y.div_(total + (largest - largest))  # 0, or NaN


@torch.no_grad()
def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axes, of ``n`` values together, in float32 but for the sums and the square root, which are float64::

        mean = float32(sum(x) / n);  c = x - mean;  deviation = float32(sqrt(sum(c * c) / n + eps))
        y = c / deviation * weight + bias

    It has no gradient.

    Args:
        x: float32 ``[..., *shape]``.
        weight, bias: ``[*shape]``.

    >>> layer_norm(torch.tensor([1.0, 2.0, 3.0]), [3])
    tensor([-1.2247,  0.0000,  1.2247])
    """
    return _by_rows(lambda rows: _layer_norm(rows, shape, weight, bias, eps), x, len(shape))


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    axes, n = list(range(-len(shape), 0)), math.prod(shape)
    c = x - (x.sum(axes, keepdim=True, dtype=torch.float64) / n).float()
    y = c.div_(torch.sqrt((c * c).sum(axes, keepdim=True, dtype=torch.float64) / n + eps).float())
    y = y if weight is None else y.mul_(weight)
    return y if bias is None else y.add_(bias)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor, axes: int) -> Tensor:
    """A function of each row (the last ``axes``), of so many rows at a time that they stay in the cache; a compiler sees all at once."""
    if torch.compiler.is_compiling() or not x.numel():
        return function(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    row = x.shape[x.ndim - axes :]
    count = max(1, IN_CACHE // row.numel())
    for part, out in zip(*(torch.split(t.reshape(-1, *row), count) for t in (x, y)), strict=True):
        out.copy_(function(part))
    return y
