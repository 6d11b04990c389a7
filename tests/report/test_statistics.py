"""Statistics against direct float64 computation, one pass against many, and what was planted is seen."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quantsim import QuantConfig, QuantSim
from quantsim.graph.place import FROM_IDS
from quantsim.numerics.affine import dequantize, quantize
from quantsim.numerics.sqnr import Noise
from quantsim.report.statistics import EdgeStatistics, Histogram, activation_statistics, weight_statistics
from tests.tiny import HEADS, batch_for, tiny_batch, tiny_bert, tiny_sim

BATCH = tiny_batch(4, 10, seed=3)
DENSE = "bert.encoder.layer.0.output.dense.output"
NORM = "bert.encoder.layer.0.output.LayerNorm.output"


def measure(sim: QuantSim, batch: dict[str, Tensor] = BATCH) -> dict[str, EdgeStatistics]:
    return activation_statistics(sim.graph, sim.placements, batch)[0]


def captured(sim: QuantSim, batch: dict[str, Tensor] = BATCH) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each quantizer and what comes out, seen by hooks of the running model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    into: dict[str, Tensor] = {}
    handles = []
    for name, q in sim.quantizers.items():
        handles.append(q.register_forward_pre_hook(lambda m, args, name=name: into.__setitem__(name, args[0].clone())))
        handles.append(q.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (into[name], out.clone()))))
    with torch.no_grad():
        sim.model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("preset", QuantConfig.presets())
def test_every_figure_is_that_of_float64(preset: str) -> None:
    sim = tiny_sim(config=preset)
    found, simulated = measure(sim), captured(sim)
    with sim.quantizers_off():
        floating = captured(sim)
    activations = [p for p in sim.placements if p.role != "weight" and p.spec]
    assert activations
    for p in activations:
        s, (x, x_hat), y = found[p.name], simulated[p.name], floating[p.name][0]
        q = sim.quantizers[p.name]
        x64, hat64, y64 = x.double().numpy(), x_hat.double().numpy(), y.double().numpy()
        assert (s.values, s.masked) == (x.numel(), 0)
        assert (s.low, s.high) == (x.min().item(), x.max().item())
        assert s.own is not None
        assert s.total is not None
        assert s.own.db == pytest.approx(10 * np.log10((x64**2).sum() / ((x64 - hat64) ** 2).sum()), rel=1e-9)
        assert s.total.db == pytest.approx(10 * np.log10((y64**2).sum() / ((y64 - hat64) ** 2).sum()), rel=1e-9)
        params = q.affine_params()
        r = np.round(x.numpy() / params.scale.item()) + params.zero_point.item()
        assert (s.clipped_low, s.clipped_high) == ((r < params.quant_min).sum(), (r > params.quant_max).sum())
        assert s.grid is not None
        assert s.grid[0] == dequantize(torch.tensor(params.quant_min), params).item()
        assert s.grid[1] == dequantize(torch.tensor(params.quant_max), params).item()
        assert_histogram(s, x.numpy())


def assert_histogram(s: EdgeStatistics, x: np.ndarray) -> None:
    assert s.histogram is not None
    edges = s.histogram.width * (s.histogram.first + np.arange(len(s.histogram.counts) + 1))
    expected, _ = np.histogram(x.reshape(-1).astype(np.float64), bins=np.append(edges[:-1], np.nextafter(edges[-1], np.inf)))
    assert list(s.histogram.counts) == expected.tolist()
    assert sum(s.histogram.counts) == s.values - s.masked


def test_weights_are_measured_whole_with_the_range_of_each_channel() -> None:
    sim = tiny_sim()
    found = weight_statistics(sim.graph)
    assert set(found) == {p.name for p in sim.placements if p.role == "weight" and p.spec}
    for name, s in found.items():
        w, params = sim.model.get_parameter(name).detach(), sim.quantizers[name].affine_params()
        params = replace(params, scale=params.scale.detach(), zero_point=params.zero_point.detach())
        w_hat = dequantize(quantize(w, params), params).double()
        assert s.own is not None
        assert s.own.db == pytest.approx(10 * math.log10(w.double().square().sum() / (w.double() - w_hat).square().sum()), rel=1e-9)
        assert s.values == w.numel()
        assert s.clipped == 0
        assert s.channels == ()
        assert_histogram(s, w.numpy())


@pytest.mark.parametrize("head", HEADS)
def test_every_edge_with_values_of_its_own_has_statistics(head: str) -> None:
    sim = tiny_sim(head)
    expected = [p.name for p in sim.placements if p.role != "weight" and p.reason != FROM_IDS]
    assert sorted(measure(sim, batch_for(head))) == sorted(expected)


def test_batches_add_up_to_all_rows_at_once() -> None:
    sim = tiny_sim()
    halves = [{name: x[rows] for name, x in BATCH.items()} for rows in (slice(0, 1), slice(1, 4))]
    first, second = (measure(sim, half) for half in halves)
    for name, whole in measure(sim).items():
        if "position_embeddings" in name:  # has no axis of rows: every pass counts
            continue
        s = first[name] + second[name]
        for field in ("values", "masked", "grid"):
            assert getattr(s, field) == getattr(whole, field)
        for field in ("low", "high"):
            assert getattr(s, field) == pytest.approx(getattr(whole, field), rel=1e-3, abs=1e-3)  # float noise, now and then a tie
        assert sum(s.histogram.counts) == sum(whole.histogram.counts)
        assert s.total.db == pytest.approx(whole.total.db, abs=0.5)
        assert s.channels == pytest.approx(whole.channels, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_histograms_of_different_widths_add_exactly(scale: float) -> None:
    one, two = torch.randn(500), scale * torch.randn(300) + 2
    x = torch.cat([one, two])
    low, high = x.min().item(), x.max().item()
    halves = [Histogram.of(v, v.min().item(), v.max().item()).within(low, high) for v in (one, two)]
    whole = Histogram.of(x, low, high)
    assert {(h.width, h.first) for h in halves} == {(whole.width, whole.first)}
    assert [a + b for a, b in zip(*(h.counts for h in halves), strict=True)] == list(whole.counts)


def test_a_planted_outlier_channel_is_reported() -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[5] *= 40
    sim = QuantSim(model)
    sim.compute_encodings([BATCH])
    s = measure(sim)[NORM]
    assert s.outlier_channels[0] == 5
    x = captured(sim)[NORM][0]
    greatest = x.abs().amax((0, 1)).double()
    assert s.outlier_ratios[5] == pytest.approx((greatest[5] / greatest.quantile(0.5)).item())
    assert s.outlier_ratios[5] > 6
    assert measure(tiny_sim())[NORM].outlier_channels == ()


def test_a_range_that_is_too_narrow_is_seen_as_clipping() -> None:
    sim = tiny_sim()
    assert measure(sim)[DENSE].clipped < 0.05
    sim.quantizers[DENSE].set_range(torch.tensor(-0.5), torch.tensor(0.25))
    s = measure(sim)[DENSE]
    x = captured(sim)[DENSE][0].double()
    step = 0.75 / 255
    assert s.clipped_low == pytest.approx(int((x < -0.5 - step / 2).sum()), abs=1)
    assert s.clipped_high == pytest.approx(int((x > 0.25 + step / 2).sum()), abs=1)
    assert s.clipped > 0.5
    assert s.own is not None
    assert s.own.db < 6


def test_a_mask_is_counted_and_left_out() -> None:
    sim = tiny_sim(config="bondarenko")  # whose mask is not clamped
    found = measure(sim)
    sums = [s for name, s in found.items() if name.endswith("attention.self.add")]
    assert len(sums) == 2
    padded = int((BATCH["attention_mask"] == 0).sum())
    for s in sums:
        assert s.masked == padded * 2 * 10  # heads, queries
        assert s.low > -1e4
        assert s.total is not None
        assert 0 < s.total.db < 100


def test_without_calibration_there_are_values_and_no_noise() -> None:
    sim = tiny_sim(calibrated=False)
    for s in [*measure(sim).values(), *weight_statistics(sim.graph).values()]:
        assert (s.grid, s.own, s.clipped) == (None, None, 0)
        assert s.histogram is not None
    assert measure(sim)[DENSE].total.db == math.inf


def test_what_was_measured_survives_as_a_dictionary() -> None:
    sim = tiny_sim()
    for s in measure(sim).values():
        assert EdgeStatistics.from_dict(asdict(s)) == s


def test_noise_adds_up() -> None:
    x, y = torch.randn(100), torch.randn(50)
    both = Noise.between(x, x.round()) + Noise.between(y, y.round())
    whole = torch.cat([x, y])
    assert both.db == pytest.approx(Noise.between(whole, whole.round()).db)
