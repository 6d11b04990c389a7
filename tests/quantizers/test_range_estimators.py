"""Every range estimator against a brute-force reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
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
    """At every edge between two bins, as many values lie below as were counted (values within float error of an edge aside)."""
    data = {scale: scale * torch.randn(3000) + scale / 7 for scale in order}
    histogram = Histogram(None)
    for scale in order:
        histogram.observe(data[scale])
    everything = torch.cat(list(data.values())).double()
    assert histogram.counts.sum() == len(everything)
    width = histogram.width.double() / BINS_PER_TENSOR
    edges = histogram.low.double() + width * torch.arange(1, BINS_PER_TENSOR + 1)
    slack = 1e-3 * width
    cumulative = histogram.counts[0].cumsum(0)
    below = (everything[None] < (edges - slack)[:, None]).sum(1)
    up_to = (everything[None] < (edges + slack)[:, None]).sum(1)
    assert (cumulative >= below).all()
    assert (cumulative <= up_to).all()


@pytest.mark.parametrize("first", [0.0, 5.0, -1e6], ids=["zeros", "fives", "minus a million"])
def test_histogram_survives_a_first_batch_of_one_value(first: float) -> None:
    histogram = Histogram(None)
    histogram.observe(torch.full((10,), first))
    histogram.observe(torch.linspace(-3, 10, 1000))
    assert histogram.counts.sum() == 1010
    assert histogram.low.item() <= min(first, -3.0)
    assert (histogram.low + histogram.width).item() >= max(first, 10.0)


def test_histogram_per_channel_counts_each_channel_alone() -> None:
    histogram = Histogram(1)
    scales = torch.tensor([0.1, 1.0, 50.0])[:, None]
    for factor in (1.0, 20.0, 0.3):
        histogram.observe(factor * scales * torch.randn(7, 3, 11))
    assert histogram.counts.shape == (3, BINS_PER_CHANNEL)
    assert histogram.counts.sum(1).tolist() == [231, 231, 231]
    assert (histogram.width[2] > 50 * histogram.width[0]).item()


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
    bin_width = estimator.width.item() / BINS_PER_TENSOR
    assert_quantile(low, torch.cat(data), 1 - percentile / 100, bin_width)
    assert_quantile(high, torch.cat(data), percentile / 100, bin_width)


def test_percentile_per_channel_is_numpys_quantile_within_a_bin() -> None:
    x = torch.randn(4000, 3) * torch.tensor([1.0, 10.0, 0.2])
    estimator = range_estimator(QuantSpec(estimator="percentile", percentile=95.0, axis=1))
    estimator.observe(x)
    low, high = estimator.range()
    for i in range(3):
        bin_width = estimator.width[i].item() / BINS_PER_CHANNEL
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
