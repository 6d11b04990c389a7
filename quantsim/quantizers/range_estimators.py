"""Range estimators: values are observed, a range ``(min, max)`` comes out.

Every estimator sees tensors of any shape and keeps one range (``[]``), or one per index of ``axis`` (``[C]``).
What they keep is small whatever the number of batches: two numbers, or a histogram with exact counts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, smallest_range

BINS_PER_TENSOR, BINS_PER_CHANNEL = 2048, 512
CLIP_WEIGHT_SQNR = 3.0  # AIMET's TF-enhanced analyzer counts clipping noise three times


class RangeEstimator(Protocol):
    """Turns observed values into a range."""

    def observe(self, x: Tensor) -> None:
        """Take the values of ``x`` into account."""

    def range(self) -> tuple[Tensor, Tensor]:
        """``(min, max)``, each ``[]`` or ``[C]``. Raises ``RuntimeError`` when nothing was observed."""


def range_estimator(spec: QuantSpec) -> RangeEstimator:
    """The estimator that ``spec`` names."""
    if spec.estimator == "min_max":
        return MinMax(spec.axis)
    if spec.estimator == "running_min_max":
        return RunningMinMax(spec.axis, spec.momentum)
    if spec.estimator == "percentile":
        return Percentile(spec.axis, spec.percentile)
    return LeastNoise(spec, clip_weight=CLIP_WEIGHT_SQNR if spec.estimator == "sqnr" else 1.0)


def _min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        low, high = torch.aminmax(x.movedim(axis, 0).reshape(x.shape[axis], -1), dim=1)  # [.., C, ..] -> [C]
    return low.float(), high.float()


class MinMax:
    """The smallest and the largest value of all."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.seen: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor) -> None:
        low, high = _min_max(x, self.axis)
        self.seen = (low, high) if self.seen is None else self.merge(self.seen, (low, high))

    def merge(self, past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.minimum(past[0], new[0]), torch.maximum(past[1], new[1])

    def range(self) -> tuple[Tensor, Tensor]:
        if self.seen is None:
            raise RuntimeError("no values were observed")
        return self.seen


class RunningMinMax(MinMax):
    """Exponential moving averages of each batch's extremes: ``momentum * past + (1 - momentum) * new``."""

    def __init__(self, axis: int | None, momentum: float) -> None:
        super().__init__(axis)
        self.momentum = momentum

    def merge(self, past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.lerp(new[0], past[0], self.momentum), torch.lerp(new[1], past[1], self.momentum)


class Histogram:
    """Counts over equal bins of a range that doubles when a value falls outside, so no count is ever approximated.

    Attributes:
        counts: ``[C, bins]`` (``C`` is 1 without an axis).
        low, width: the range of each row, ``[C]``; its bins are ``low + width / bins * [i, i + 1)``.
    """

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.bins = BINS_PER_TENSOR if axis is None else BINS_PER_CHANNEL
        self.extremes = MinMax(axis)
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        self.extremes.observe(x)
        rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        rows = rows.float()  # [C, n]
        low, high = (t.reshape(-1) for t in self.extremes.range())
        if not self._countable():
            return
        if self.counts is None:
            self.counts = torch.zeros(len(rows), self.bins, dtype=torch.float64, device=x.device)
            self.low = low.clone()
            self.width = ((high - low) * (1 + 1e-6)).clamp(min=smallest_range(low.dtype))
        self._grow(low, high)
        index = ((rows - self.low[:, None]) / self.width[:, None] * self.bins).long().clamp_(0, self.bins - 1)
        index += torch.arange(len(rows), device=x.device)[:, None] * self.bins
        self.counts += torch.bincount(index.reshape(-1), minlength=self.counts.numel()).reshape(self.counts.shape)

    def _countable(self) -> bool:
        """No NaN, no infinity, and no unclamped mask was seen; else the range is that of the extremes, for the quantizer to refuse."""
        low, high = self.extremes.range()
        return bool(((high - low) * 4).isfinite().all())  # a range that is doubled once too often overflows

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Double the ranges of the rows that miss a value: downwards first, then upwards; two bins become one."""
        assert self.counts is not None
        while True:
            down, up = low < self.low, high > self.low + self.width
            rows = down | up
            if not rows.any():
                return
            merged = self.counts[rows].reshape(-1, self.bins // 2, 2).sum(2)  # [rows, bins] -> [rows, bins / 2]
            empty = torch.zeros_like(merged)
            below = down[rows][:, None]
            self.counts[rows] = torch.cat([torch.where(below, empty, merged), torch.where(below, merged, empty)], 1)
            self.low = torch.where(down, self.low - self.width, self.low)
            self.width = torch.where(rows, self.width * 2, self.width)

    def _shape(self, rows: Tensor) -> Tensor:
        return rows[0] if self.axis is None else rows  # [1] -> []

    def _centres(self) -> Tensor:
        """The middle of every bin, ``[C, bins]``."""
        steps = (torch.arange(self.bins, device=self.low.device) + 0.5) / self.bins
        return self.low[:, None] + self.width[:, None] * steps


class Percentile(Histogram):
    """The values below and above which ``100 - percentile`` percent of the elements lie, on each side."""

    def __init__(self, axis: int | None, percentile: float) -> None:
        super().__init__(axis)
        self.tail = 1 - percentile / 100

    def range(self) -> tuple[Tensor, Tensor]:
        seen = self.extremes.range()
        if not self._countable():
            return seen
        assert self.counts is not None
        total = self.counts.sum(1, keepdim=True)
        below = self.counts.cumsum(1) / total  # [C, bins], the share of elements up to the end of each bin
        above = self.counts.flip(1).cumsum(1).flip(1) / total
        step = self.width / self.bins
        low = self.low + step * (below <= self.tail).sum(1)
        high = self.low + self.width - step * (above <= self.tail).sum(1)
        low, high = self._shape(low), self._shape(high)
        return torch.maximum(low, seen[0]), torch.minimum(torch.maximum(high, low), seen[1])


class LeastNoise(Histogram):
    """The range of least quantization noise: ``sum (x - x_hat)^2`` inside plus ``clip_weight`` times it outside.

    ``clip_weight=1`` is the mean squared error (Bondarenko et al., 2021); 3 is AIMET's "TF-enhanced" choice, which
    spares outliers. Searched over shrunk copies of the observed range, then more finely around the best: ends
    independently for asymmetric grids, together for symmetric ones.
    """

    CANDIDATES_SYMMETRIC, CANDIDATES_PER_END, FINER = 100, 32, 8

    def __init__(self, spec: QuantSpec, clip_weight: float) -> None:
        super().__init__(spec.axis)
        self.spec = spec
        self.clip_weight = clip_weight

    def range(self) -> tuple[Tensor, Tensor]:
        if not self._countable():
            return self.extremes.range()
        low, high = (t.reshape(-1) for t in self.extremes.range())
        count = self.CANDIDATES_SYMMETRIC if self.spec.symmetric else self.CANDIDATES_PER_END
        best = torch.ones(2, len(low), dtype=low.dtype, device=low.device)  # how far each end is shrunk, [2, C]
        best = self._search(low, high, best, [-i / count for i in range(count)])
        best = self._search(low, high, best, [i / count / self.FINER for i in range(-self.FINER, self.FINER + 1)])
        return self._shape(low * best[0]), self._shape(high * best[1])

    def _search(self, low: Tensor, high: Tensor, around: Tensor, steps: list[float]) -> Tensor:
        """The best of ``around`` plus each step (each pair of steps for asymmetric grids), never past the observed range; ``[2, C]``."""
        pairs = [(a, a) for a in steps] if self.spec.symmetric else [(a, b) for a in steps for b in steps]
        best, least = around, torch.full_like(low, torch.inf, dtype=torch.float64)
        for pair in pairs:
            shrunk = (around + around.new_tensor(pair)[:, None]).clamp(0.0, 1.0)
            noise = self._noise(low * shrunk[0], high * shrunk[1])
            best = torch.where(noise < least, shrunk, best)
            least = torch.minimum(noise, least)
        return best

    def _noise(self, low: Tensor, high: Tensor) -> Tensor:
        """Noise of each row on the range ``[low, high]``, ``[C]``."""
        assert self.counts is not None
        params = affine_params(low, high, self.spec)
        rows = AffineParams(params.scale[:, None], params.zero_point[:, None], params.quant_min, params.quant_max)
        x = self._centres()
        r = (x / rows.scale).round()
        q = torch.minimum(torch.maximum(r, rows.quant_min - rows.zero_point), rows.quant_max - rows.zero_point)
        weight = torch.where(r == q, 1.0, self.clip_weight)
        return (self.counts * weight * (x - q * rows.scale).square()).sum(1)
