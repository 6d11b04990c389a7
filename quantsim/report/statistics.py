"""What passes each edge: extremes, histogram, clipping, noise and the greatest value of each channel, summed over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, fx

from quantsim.graph.place import FROM_IDS, Placement
from quantsim.numerics.affine import AffineParams, grid_range
from quantsim.numerics.sqnr import Noise
from quantsim.quantizers.bins import Bins
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.report.walk import Batch, Walk, evaluating, everyone, nobody
from quantsim.rewrites.insert_quantizers import weights_of

BINS = 256  # half of them or more lie within the extremes
OUTLIER_RATIO = 6.0
FEWEST_CHANNELS = 8  # of fewer the median says nothing


@dataclass(frozen=True)
class Histogram:
    """Exact counts: bin ``i`` holds the values of ``width * [first + i, first + i + 1)``; bins follow from the extremes (:class:`Bins`)."""

    width: float
    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, low: float, high: float) -> Histogram:
        bins = _bins(low, high)
        counts = torch.bincount(bins.of(x.reshape(1, -1).float())[0].clamp_(0, BINS - 1), minlength=BINS)
        return cls(bins.width.item(), int(bins.first.item()), tuple(counts.tolist()))

    def within(self, low: float, high: float) -> Histogram:
        """The same values in the bins of wider extremes."""
        bins = _bins(low, high)
        own = Bins(torch.tensor([self.width]).double(), torch.tensor([self.first]).double(), BINS)
        counts = bins.hold(torch.tensor([self.counts]).double(), own)[0]
        return Histogram(bins.width.item(), int(bins.first.item()), tuple(int(c) for c in counts.tolist()))


def _bins(low: float, high: float) -> Bins:
    return Bins.over(torch.tensor([low]), torch.tensor([high]), BINS)


@dataclass(frozen=True)
class EdgeStatistics:
    """One edge, over all values that passed it in the simulation (padded positions too: the quantizer sees them).

    Attributes:
        name: the placement's.
        values: how many passed.
        masked: of these, not finite or an attention mask's "minus infinity": left out of all that follows.
        low, high: extremes of what comes in.
        histogram: of what comes in; ``None`` where every value is masked.
        grid: the smallest and the greatest value of the quantizer's grid (over channels); ``None`` without a calibrated quantizer.
        clipped_low, clipped_high: values that round to an integer beyond the grid's end.
        own: what comes in against what comes out: the noise that this quantizer adds. ``None`` without one.
        total: the floating-point model's value against the simulation's, all quantizers on; ``None`` for a weight.
        channels: the greatest ``|x|`` of each channel of an activation; empty where the edge has none.
    """

    name: str
    values: int
    masked: int
    low: float
    high: float
    histogram: Histogram | None
    grid: tuple[float, float] | None
    clipped_low: int
    clipped_high: int
    own: Noise | None
    total: Noise | None
    channels: tuple[float, ...]

    @property
    def clipped(self) -> float:
        """The share of values that are clipped."""
        return (self.clipped_low + self.clipped_high) / max(1, self.values - self.masked)

    @property
    def outlier_ratios(self) -> tuple[float, ...]:
        """The greatest ``|x|`` of each channel over the median of them; a channel of :data:`OUTLIER_RATIO` or more is an outlier channel.

        Empty where there are fewer than 8 channels, or the median is 0.
        """
        if len(self.channels) < FEWEST_CHANNELS:
            return ()
        median = torch.tensor(self.channels).double().quantile(0.5).item()
        return tuple(x / median for x in self.channels) if median else ()

    @property
    def outlier_channels(self) -> tuple[int, ...]:
        """The channels that are outliers, the greatest first."""
        ratios = self.outlier_ratios
        return tuple(sorted((i for i, r in enumerate(ratios) if r >= OUTLIER_RATIO), key=lambda i: -ratios[i]))

    def __add__(self, other: EdgeStatistics) -> EdgeStatistics:
        """The statistics of what both saw."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        histograms = [h.within(low, high) for h in (self.histogram, other.histogram) if h is not None]
        counts = [tuple(map(sum, zip(*(h.counts for h in histograms), strict=True)))] if histograms else []
        return replace(
            self,
            values=self.values + other.values,
            masked=self.masked + other.masked,
            low=low,
            high=high,
            histogram=replace(histograms[0], counts=counts[0]) if histograms else None,
            clipped_low=self.clipped_low + other.clipped_low,
            clipped_high=self.clipped_high + other.clipped_high,
            own=self.own + other.own if self.own and other.own else None,
            total=self.total + other.total if self.total and other.total else None,
            channels=tuple(map(max, self.channels, other.channels)),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of ``dataclasses.asdict``, or of the JSON made of it."""
        histogram, grid = values["histogram"], values["grid"]
        nested: dict[str, Any] = {
            "histogram": None if histogram is None else Histogram(histogram["width"], histogram["first"], tuple(histogram["counts"])),
            "grid": None if grid is None else (grid[0], grid[1]),
            "channels": tuple(values["channels"]),
        }
        for name in ("own", "total"):
            nested[name] = None if values[name] is None else Noise(**values[name])
        return cls(**{**values, **nested})


# ---- measure ----


@torch.no_grad()
def activation_statistics(
    graph: fx.GraphModule, placements: Sequence[Placement], batch: Batch
) -> tuple[dict[str, EdgeStatistics], dict[str, Tensor], dict[str, Tensor]]:
    """Every activation edge on one batch, and the outputs in floating point and simulated.

    Both models walk side by side, node by node, so that only values which are still needed are held.

    Returns:
        name → statistics, in the order of the graph; the floating-point outputs; the simulation's.
    """
    plain = {p.node.name: p for p in placements if p.role != "weight" and p.spec is None and p.reason != FROM_IDS}
    placed = {p.name: p for p in placements if p.role != "weight" and p.spec is not None}
    found: dict[str, EdgeStatistics] = {}
    with evaluating(graph):
        floating, simulated = Walk(graph, batch, nobody), Walk(graph, batch, everyone)
        while simulated.position < len(simulated.nodes) - 1:
            node = simulated.nodes[simulated.position]
            quantizer = quantizer_of(node, graph)
            before = simulated.env[node.args[0]] if quantizer else None
            (_, y), (_, y_hat) = floating.step(), simulated.step()
            if quantizer is not None and quantizer.name in placed:  # an activation's
                found[quantizer.name] = _observe(placed[quantizer.name], before, y_hat, y, quantizer)
            elif node.name in plain and isinstance(y, Tensor):
                found[plain[node.name].name] = _observe(plain[node.name], y_hat, y_hat, y, None)
        return found, floating.finish(), simulated.finish()


@torch.no_grad()
def weight_statistics(graph: fx.GraphModule) -> dict[str, EdgeStatistics]:
    """Every quantized weight, whole."""
    found = {}
    for quantizer, weight in weights_of(graph):
        x = weight.detach()
        on = quantizer.calibrated
        x_hat = quantizer(x.clone()) if on else x
        found[quantizer.name] = _statistics(quantizer.name, x, x_hat, None, quantizer.affine_params() if on else None, ())
    return found


def _observe(p: Placement, x: Any, x_hat: Tensor, y: Tensor, quantizer: FakeQuantizer | None) -> EdgeStatistics:
    params = quantizer.affine_params() if quantizer is not None and quantizer.calibrated else None
    axis = 1 if p.op.startswith("conv") else -1
    fixed = x.ndim > 1 and isinstance(p.node.meta["val"].shape[axis], int)  # else an axis of tokens
    return _statistics(p.name, x, x_hat, y, params, _channels(x, axis) if fixed else ())


def _channels(x: Tensor, axis: int) -> tuple[float, ...]:
    """The greatest ``|x|`` at each index of an axis, masked values aside."""
    rows = x.detach().movedim(axis, 0).reshape(x.shape[axis], -1)  # [C, n]
    greatest = torch.where(_unmasked(rows), rows, 0).abs().amax(1)
    return tuple(greatest.float().tolist())


def _unmasked(x: Tensor) -> Tensor:
    """Finite values that are not (nearly) the least number of their dtype, as a mask of ``x``'s shape."""
    return x.abs() < torch.finfo(x.dtype).max / 4  # false for NaN


def _statistics(
    name: str, x: Tensor, x_hat: Tensor, y: Tensor | None, params: AffineParams | None, channels: tuple[float, ...]
) -> EdgeStatistics:
    beyond = _beyond(x, params) if params is not None else None
    kept = _unmasked(x)
    if y is not None:
        kept &= _unmasked(y)
    values = x.numel()
    if not kept.all():
        x, x_hat = x[kept], x_hat[kept]
        y = None if y is None else y[kept]
        beyond = None if beyond is None else (beyond[0][kept], beyond[1][kept])
    if not x.numel():
        return EdgeStatistics(name, values, values, 0.0, 0.0, None, None, 0, 0, None, None, channels)
    low, high = (end.item() for end in torch.aminmax(x))
    ends = [end.item() for end in (grid_range(params)[0].min(), grid_range(params)[1].max())] if params is not None else None
    return EdgeStatistics(
        name=name,
        values=values,
        masked=values - x.numel(),
        low=low,
        high=high,
        histogram=Histogram.of(x, low, high),
        grid=None if ends is None else (ends[0], ends[1]),
        clipped_low=0 if beyond is None else int(beyond[0].sum()),
        clipped_high=0 if beyond is None else int(beyond[1].sum()),
        own=None if params is None else Noise.between(x, x_hat),
        total=None if y is None else Noise.between(y, x_hat),
        channels=channels,
    )


def _beyond(x: Tensor, params: AffineParams) -> tuple[Tensor, Tensor]:
    """Where values round to an integer below, and above, the grid."""
    scale, zero_point = params.broadcast(params.scale, x.ndim), params.broadcast(params.zero_point, x.ndim)
    r = (x / scale).round_() + zero_point
    return r < params.quant_min, r > params.quant_max
