"""Range estimators: values are observed, a range ``(min, max)`` comes out.

Every estimator sees tensors of any shape and keeps one range (``[]``), or one per index of ``axis`` (``[C]``).
What they keep is small: two numbers, two numbers a batch, or a histogram with exact counts. It can be merged: estimators
that saw a part of the batches each, in several processes, together give the range of one that saw them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params
from quantsim.quantizers.bins import Bins

BINS_PER_TENSOR, BINS_PER_CHANNEL = 4096, 512  # more than half of them lie within the extremes
CLIP_WEIGHT_SQNR = 3.0  # AIMET's TF-enhanced analyzer counts clipping noise three times

Statistics = tuple[Tensor, ...]


class RangeEstimator(Protocol):
    """Turns observed values into a range."""

    def observe(self, x: Tensor) -> None:
        """Take the values of ``x`` into account."""

    def statistics(self) -> Statistics:
        """All that was kept of what was observed, as tensors on the CPU; ``()`` when nothing was."""

    def merge(self, everyone: Sequence[Statistics]) -> None:
        """Become the estimator that saw what those of these statistics saw: the first batch of each in turn, then the second, …"""

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


def min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in float32: ``[]``, or of each index of ``axis`` ``[C]``."""
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
        self._take(min_max(x, self.axis))

    def statistics(self) -> Statistics:
        return () if self.seen is None else (self.seen[0].cpu(), self.seen[1].cpu())

    def merge(self, everyone: Sequence[Statistics]) -> None:
        self.seen = None
        for low, high, *_ in filter(None, everyone):
            self._take((low, high))

    def _take(self, new: tuple[Tensor, Tensor]) -> None:
        self.seen = new if self.seen is None else (torch.minimum(self.seen[0], new[0]), torch.maximum(self.seen[1], new[1]))

    def range(self) -> tuple[Tensor, Tensor]:
        if self.seen is None:
            raise RuntimeError("no values were observed")
        return self.seen


class RunningMinMax:
    """Exponential moving averages of each batch's extremes: ``momentum * past + (1 - momentum) * new``.

    The order of batches matters, so the extremes of each are kept and averaged at the end.
    """

    def __init__(self, axis: int | None, momentum: float) -> None:
        self.axis = axis
        self.momentum = momentum
        self.batches: list[Tensor] = []  # [2] or [2, C] each

    def observe(self, x: Tensor) -> None:
        self.batches.append(torch.stack(min_max(x, self.axis)))

    def statistics(self) -> Statistics:
        return tuple(batch.cpu() for batch in self.batches)

    def merge(self, everyone: Sequence[Statistics]) -> None:
        self.batches = [batch for turn in zip_longest(*everyone) for batch in turn if batch is not None]

    def range(self) -> tuple[Tensor, Tensor]:
        if not self.batches:
            raise RuntimeError("no values were observed")
        low, high = reduce(lambda past, new: torch.lerp(new, past, self.momentum), self.batches)
        return low, high


class Histogram:
    """Counts over bins that follow from the extremes alone, so they are exact and the same whatever the order of batches.

    Attributes:
        extremes: of all values.
        bins: over them.
        counts: ``[C, bins.count]``, float64 (``C`` is 1 without an axis).
    """

    bins: Bins

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.extremes = MinMax(axis)
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        self.extremes.observe(x)
        if not self._countable():
            return
        rows = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)  # [C, n]
        bins = self._bins_over(*self.extremes.range())
        counts = torch.zeros(len(rows), bins.count, dtype=torch.float64, device=x.device)
        if self.counts is not None:
            counts = bins.hold(self.counts, self.bins)
        index = bins.of(rows.float()) + bins.count * torch.arange(len(rows), device=x.device)[:, None]
        self.counts = counts + torch.bincount(index.reshape(-1), minlength=counts.numel()).reshape(counts.shape)
        self.bins = bins

    def statistics(self) -> Statistics:
        return self.extremes.statistics() + (() if self.counts is None else (self.counts.cpu(),))

    def merge(self, everyone: Sequence[Statistics]) -> None:
        self.extremes.merge(everyone)
        self.counts = None
        if not any(everyone) or not self._countable():
            return
        self.bins = self._bins_over(*self.extremes.range())
        held = [self.bins.hold(counts, self._bins_over(low, high)) for low, high, counts in filter(None, everyone)]
        self.counts = torch.stack(held).sum(0)

    def _bins_over(self, low: Tensor, high: Tensor) -> Bins:
        return Bins.over(low.reshape(-1), high.reshape(-1), BINS_PER_TENSOR if self.axis is None else BINS_PER_CHANNEL)

    def _countable(self) -> bool:
        """No NaN, no infinity, and no unclamped mask was seen; else the range is that of the extremes, for the quantizer to refuse."""
        low, high = self.extremes.range()
        return bool(((high - low) * 4).isfinite().all())  # a mask is the least number of its dtype

    def _shape(self, rows: Tensor) -> Tensor:
        return rows[0] if self.axis is None else rows  # [1] -> []


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
        low = self.bins.width * (self.bins.first + (below <= self.tail).sum(1))
        high = self.bins.width * (self.bins.first + self.bins.count - (above <= self.tail).sum(1))
        low, high = self._shape(low.float()), self._shape(high.float())
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
        x = (self.bins.edges() + self.bins.width[:, None] / 2).float()  # the middle of every bin, [C, bins]
        r = (x / rows.scale).round()
        q = torch.minimum(torch.maximum(r, rows.quant_min - rows.zero_point), rows.quant_max - rows.zero_point)
        weight = torch.where(r == q, 1.0, self.clip_weight)
        return (self.counts * weight * (x - q * rows.scale).square()).sum(1)
