"""Every range estimator against a brute-force reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.quantizers.bins import Bins
from quantsim.quantizers.range_estimators import BINS_PER_CHANNEL, BINS_PER_TENSOR, Histogram, range_estimator

ESTIMATORS = ["min_max", "running_min_max", "percentile", "mse", "sqnr"]


def estimate(spec: QuantSpec, *batches: Tensor) -> tuple[Tensor, Tensor]:
    estimator = range_estimator(spec)
    for x in batches:
        estimator.observe(x)
    return estimator.range()


def batches(scales: tuple[float, ...] = (1.0, 0.1, 5.0), shift: float = 0.3) -> list[Tensor]:
    return [scale * torch.randn(6, 40, 8) + shift for scale in scales]


# ---- min-max ----


def test_min_max_is_the_least_and_greatest_of_all_batches() -> None:
    data = batches()
    low, high = estimate(QuantSpec(), *data)
    assert low == min(x.min() for x in data)
    assert high == max(x.max() for x in data)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_min_max_per_channel(axis: int) -> None:
    x = torch.randn(3, 4, 5)
    low, high = estimate(QuantSpec(axis=axis), x)
    for i in range(x.shape[axis]):
        assert low[i] == x.select(axis, i).min()
        assert high[i] == x.select(axis, i).max()


@pytest.mark.parametrize("axis", [None, 1])
def test_running_min_max_is_the_written_out_average(axis: int | None) -> None:
    data, momentum = batches((1.0, 3.0, 0.5, 2.0)), 0.7
    low, high = estimate(QuantSpec(estimator="running_min_max", momentum=momentum, axis=axis), *data)
    others = (0, 1, 2) if axis is None else (0, 2)
    expected_low, expected_high = data[0].amin(others), data[0].amax(others)
    for x in data[1:]:
        expected_low = momentum * expected_low + (1 - momentum) * x.amin(others)
        expected_high = momentum * expected_high + (1 - momentum) * x.amax(others)
    torch.testing.assert_close(low, expected_low)
    torch.testing.assert_close(high, expected_high)


# ---- histogram ----


ORDERS = [pytest.param(order, id="-".join(map(str, order))) for order in itertools.permutations((1, 30, 1000))]


@pytest.mark.parametrize("order", ORDERS)
def test_histogram_counts_are_exact_whatever_the_order_of_batches(order: tuple[int, ...]) -> None:
    """Every bin has as many values as float64 finds between its edges, and the bins are those of one batch with all values."""
    data = {scale: scale * torch.randn(3000) + scale / 7 for scale in sorted(order)}
    histogram, whole = Histogram(None), Histogram(None)
    for scale in order:
        histogram.observe(data[scale])
    whole.observe(torch.cat(list(data.values())))
    assert torch.equal(histogram.bins.edges(), whole.bins.edges())
    edges = torch.cat([histogram.bins.edges()[0], histogram.bins.edges()[0, -1:] + histogram.bins.width])
    found = torch.histogram(torch.cat(list(data.values())).double(), bins=edges).hist
    assert torch.equal(histogram.counts[0], found)  # type: ignore[index]


@pytest.mark.parametrize("first", [0.0, 5.0, -1e6], ids=["zeros", "fives", "minus a million"])
def test_histogram_survives_a_first_batch_of_one_value(first: float) -> None:
    histogram = Histogram(None)
    histogram.observe(torch.full((10,), first))
    histogram.observe(torch.linspace(-3, 10, 1000))
    assert histogram.counts is not None
    assert histogram.counts.sum() == 1010
    edges = histogram.bins.edges()[0]
    assert edges[0] <= min(first, -3.0)
    assert edges[-1] + histogram.bins.width > max(first, 10.0)


def test_histogram_per_channel_counts_each_channel_alone() -> None:
    histogram = Histogram(1)
    scales = torch.tensor([0.1, 1.0, 50.0])[:, None]
    for factor in (1.0, 20.0, 0.3):
        histogram.observe(factor * scales * torch.randn(7, 3, 11))
    assert histogram.counts is not None
    assert histogram.counts.shape == (3, BINS_PER_CHANNEL)
    assert histogram.counts.sum(1).tolist() == [231, 231, 231]
    assert (histogram.bins.width[2] > 50 * histogram.bins.width[0]).item()


TINY, GREAT = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (5, 5), (-1, 1), (0, 1), (1e6, 1e6 + 1), (-TINY, TINY), (-GREAT / 8, GREAT / 8), (-3, 1e9), (4095.0, 8192.0), (-1e-30, 1e-9)],
)
def test_bins_are_the_finest_that_hold_a_range(low: float, high: float) -> None:
    """Powers of 2, more than half of them used, unless that is finer than float32 is."""
    ends = torch.tensor([low, high]).float()[:, None]
    bins = Bins.over(ends[0], ends[1], BINS_PER_TENSOR)
    assert torch.frexp(bins.width)[0].item() == 0.5
    least, greatest = bins.of(ends[0][:, None]).item(), bins.of(ends[1][:, None]).item()
    assert least == 0
    assert greatest < BINS_PER_TENSOR
    finest = max(abs(low), abs(high)) * 2.0**-23
    assert greatest >= BINS_PER_TENSOR // 2 - 1 or bins.width.item() <= max(finest, TINY * 2**18 / BINS_PER_TENSOR)


def test_bins_never_get_finer_as_their_range_grows() -> None:
    ends = (torch.randn(2000, 2) * torch.exp(8 * torch.randn(2000, 1))).sort(1).values
    grown = ends + torch.stack([-torch.rand(2000), torch.rand(2000)], 1) * ends.abs().amax(1, keepdim=True) * 2
    narrow, wide = (Bins.over(x[:, 0], x[:, 1], BINS_PER_CHANNEL).width for x in (ends, grown))
    assert (wide >= narrow).all()
    assert (wide > narrow).any()


# ---- percentile ----


def assert_quantile(end: Tensor, values: Tensor, share: float, bin_width: float) -> None:
    """``end`` lies within a bin of the two order statistics that numpy's quantile lies between."""
    below, above = (np.quantile(values.numpy(), share, method=method) for method in ("lower", "higher"))
    assert below - 1.01 * bin_width <= end.item() <= above + 1.01 * bin_width


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_quantile_within_a_bin(percentile: float) -> None:
    data = [torch.randn(20_000) * scale + 0.5 for scale in (1.0, 3.0)]
    estimator = range_estimator(QuantSpec(estimator="percentile", percentile=percentile))
    for x in data:
        estimator.observe(x)
    low, high = estimator.range()
    bin_width = estimator.bins.width.item()  # type: ignore[attr-defined]
    assert_quantile(low, torch.cat(data), 1 - percentile / 100, bin_width)
    assert_quantile(high, torch.cat(data), percentile / 100, bin_width)


def test_percentile_per_channel_is_numpys_quantile_within_a_bin() -> None:
    x = torch.randn(4000, 3) * torch.tensor([1.0, 10.0, 0.2])
    estimator = range_estimator(QuantSpec(estimator="percentile", percentile=95.0, axis=1))
    estimator.observe(x)
    low, high = estimator.range()
    for i in range(3):
        bin_width = estimator.bins.width[i].item()  # type: ignore[attr-defined]
        assert_quantile(low[i], x[:, i], 0.05, bin_width)
        assert_quantile(high[i], x[:, i], 0.95, bin_width)


def test_a_hundred_percent_is_min_max() -> None:
    data = batches()
    assert estimate(QuantSpec(estimator="percentile", percentile=100.0), *data) == estimate(QuantSpec(), *data)


# ---- least noise ----


def noise(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, clip_weight: float) -> Tensor:
    """Squared error of quantizing ``x`` on each of the ranges ``[n]``, clipped values weighted; float64, written out."""
    low, high = low.clamp(max=0)[:, None], high.clamp(min=0)[:, None]
    if spec.symmetric:
        scale, zero = torch.maximum(high / spec.quant_max, low / spec.quant_min), torch.zeros_like(low)
    else:
        scale = (high - low) / spec.quant_max
        zero = -(low / scale).round()
    r = (x / scale).round() + zero
    q = r.clamp(spec.quant_min, spec.quant_max)
    weight = torch.where(r == q, 1.0, clip_weight)
    return (weight * (x - (q - zero) * scale).square()).sum(1)


def samples(name: str) -> Tensor:
    x = torch.randn(2000, dtype=torch.float64)
    if name == "skewed":
        return torch.nn.functional.gelu(3 * x)
    if name == "outliers":
        x[:6] *= 25
    return x


@pytest.mark.parametrize("distribution", ["normal", "skewed", "outliers"])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("estimator", "clip_weight"), [("mse", 1.0), ("sqnr", 3.0)], ids=["mse", "sqnr"])
def test_least_noise_is_near_the_best_of_a_fine_grid(
    estimator: str, clip_weight: float, symmetric: bool, bits: int, distribution: str
) -> None:
    """Within 1% of 400 symmetric ranges, or 40 × 40 asymmetric ones, tried on the values themselves."""
    spec = QuantSpec(bits=bits, symmetric=symmetric, estimator=estimator)
    x = samples(distribution)
    found = [end.double().reshape(1) for end in estimate(spec, x.float())]
    shrinks = torch.linspace(1 / 400, 1, 400 if symmetric else 40, dtype=torch.float64)
    a, b = (shrinks, shrinks) if symmetric else (t.reshape(-1) for t in torch.meshgrid(shrinks, shrinks, indexing="ij"))
    best = min(
        noise(x, low, high, spec, clip_weight).min() for low, high in zip((x.min() * a).split(400), (x.max() * b).split(400), strict=True)
    )
    assert noise(x, *found, spec, clip_weight).item() <= 1.01 * best.item()


def test_clipping_counted_three_times_clips_less() -> None:
    x = torch.randn(20_000)
    widths = {name: (ends := estimate(QuantSpec(bits=3, estimator=name), x))[1] - ends[0] for name in ("mse", "sqnr", "min_max")}
    assert widths["mse"] < widths["sqnr"] < widths["min_max"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_least_noise_per_channel_is_that_of_each_channel(symmetric: bool) -> None:
    """The histogram of a channel is coarser than that of a tensor, so the noise is compared and not the range."""
    x = torch.randn(3, 4000) * torch.tensor([[1.0], [20.0], [0.1]])
    spec = QuantSpec(bits=4, symmetric=symmetric, estimator="mse", axis=0)
    low, high = estimate(spec, x)
    assert low.shape == high.shape == (3,)
    for i in range(3):
        alone = [end.double().reshape(1) for end in estimate(QuantSpec(bits=4, symmetric=symmetric, estimator="mse"), x[i])]
        together = [low[i : i + 1].double(), high[i : i + 1].double()]
        assert noise(x[i].double(), *together, spec, 1.0) <= 1.01 * noise(x[i].double(), *alone, spec, 1.0)


# ---- all of them ----


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_observed_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match="no values were observed"):
        estimate(QuantSpec(estimator=name))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_zeros_give_a_range_of_zero(name: str, axis: int | None) -> None:
    low, high = estimate(QuantSpec(estimator=name, axis=axis), torch.zeros(3, 8))
    assert low.abs().max() == high.abs().max() == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ranges_of_bfloat16_values_are_float32(name: str) -> None:
    low, high = estimate(QuantSpec(estimator=name), torch.randn(400).bfloat16())
    assert low.dtype == high.dtype == torch.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_range_lies_within_what_was_seen(name: str) -> None:
    data = batches()
    low, high = estimate(QuantSpec(estimator=name, bits=4), *data)
    assert min(x.min() for x in data) <= low < high <= max(x.max() for x in data)


# ---- merged ----


def merged(spec: QuantSpec, *shares: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The range of an estimator that merged those of several processes, each with its share of the batches."""
    estimators = [range_estimator(spec) for _ in shares]
    for estimator, share in zip(estimators, shares, strict=True):
        for x in share:
            estimator.observe(x)
    everyone = [estimator.statistics() for estimator in estimators]
    ranges = []
    for estimator in estimators:
        estimator.merge(everyone)
        ranges.append(estimator.range())
    for other in ranges[1:]:
        torch.testing.assert_close(other, ranges[0], rtol=0, atol=0, equal_nan=True)
    return ranges[0]


@pytest.mark.parametrize("axis", [None, 2])
@pytest.mark.parametrize("processes", [2, 3, 7], ids=["2", "3", "more than batches"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_merged_is_what_one_sees_of_all_batches_dealt_out_in_turn(name: str, processes: int, axis: int | None) -> None:
    data = batches((1.0, 0.1, 50.0, 3.0, 0.01))
    spec = QuantSpec(estimator=name, axis=axis, bits=4, symmetric=True, percentile=99.0)
    alone = estimate(spec, *data)
    together = merged(spec, *(data[rank::processes] for rank in range(processes)))
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "running_min_max"])
def test_all_but_running_averages_are_the_same_for_any_order(name: str) -> None:
    data, spec = batches((1.0, 0.1, 50.0)), QuantSpec(estimator=name, bits=4, symmetric=True, percentile=99.0)
    assert len({tuple(end.item() for end in estimate(spec, *order)) for order in itertools.permutations(data)}) == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_process_that_saw_nothing_adds_nothing(name: str) -> None:
    data, spec = batches(), QuantSpec(estimator=name, symmetric=True)
    assert merged(spec, [], data, []) == estimate(spec, *data)
    with pytest.raises(RuntimeError, match="no values were observed"):
        merged(spec, [], [])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, torch.finfo(torch.float32).min], ids=["nan", "infinity", "mask"])
def test_what_one_process_cannot_count_is_in_the_range_of_all(name: str, bad: float) -> None:
    """The range is for the quantizer to refuse, so it must not be hidden by the others' histograms."""
    low, high = merged(QuantSpec(estimator=name), batches(), [torch.tensor([0.0, bad])])
    assert not (high - low).isfinite() or low < -1e37


@pytest.mark.parametrize("name", ESTIMATORS)
def test_statistics_are_small(name: str) -> None:
    estimator = range_estimator(QuantSpec(estimator=name))
    for x in batches():
        estimator.observe(x)
    assert sum(x.numel() for x in estimator.statistics()) <= BINS_PER_TENSOR + 6
