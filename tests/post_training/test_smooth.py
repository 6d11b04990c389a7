"""Smoothing: the formula, that it changes nothing in floating point, and that it helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantsim import EncodingsError, QuantConfig, QuantSim, Rule
from quantsim.post_training.smooth import scales, smooth
from tests.post_training.outliers import BATCHES, CHANNELS, OTHERS, logits, noise, sick_bert, simulate

NAME = "scales.bert.encoder.layer.0.attention.output.LayerNorm.output"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_the_formula_to_the_next_power_of_two(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    activations, columns = (torch.rand(40, generator=generator).mul(8).exp() for _ in range(2))
    exact = activations.double() ** alpha / columns.double() ** (1 - alpha)
    exact /= exact.log().mean().exp()
    found = scales(activations, columns, alpha)
    assert ((found.double() / exact).log2().abs() <= 0.5 + 1e-5).all()
    assert torch.equal(found.log2(), found.log2().round())


def test_channels_of_zeros_get_a_finite_scale() -> None:
    assert scales(torch.tensor([0.0, 2.0, 8.0]), torch.tensor([1.0, 0.0, 4.0]), 0.5).isfinite().all()
    assert scales(torch.zeros(3), torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_the_float_model_stays_what_it_was_to_the_bit() -> None:
    sim = simulate(smooth=0.5)
    scale = sim.model.get_buffer(f"{NAME}.scale")
    assert (scale[list(CHANNELS)] >= 4 * scale.median()).all()  # the outliers were found
    plain = QuantSim(sick_bert())
    with sim.quantizers_off(), plain.quantizers_off():
        assert torch.equal(logits(sim.model), logits(plain.model))


def test_the_second_time_changes_nothing() -> None:
    sim = simulate(smooth=0.5)
    before = {k: v.clone() for k, v in sim.model.state_dict().items()}
    smooth(sim.graph, BATCHES, 0.5)
    apart = torch.cat([v / before[k] for k, v in sim.model.state_dict().items() if k.startswith("scales.")])
    assert set(apart.tolist()) <= {0.5, 1.0, 2.0}  # what rounding to powers of 2 left
    assert (apart == 1).float().mean() > 0.8


def test_it_helps_a_model_with_outliers() -> None:
    assert noise(simulate(smooth=0.5)) < 0.3 * noise(simulate())


def test_quantizers_stay_on_the_edges_that_had_them_and_the_products_are_excused() -> None:
    sim, plain = simulate(smooth=0.5), QuantSim(sick_bert())
    assert {(p.name, p.spec) for p in sim.placements if p.spec} == {(p.name, p.spec) for p in plain.placements if p.spec}
    added = [p for p in sim.placements if p.name.startswith("scales.")]
    assert len(added) == 4
    assert all("scaled back" in p.reason for p in added)
    assert NAME in str(sim)


def test_no_rule_quantizes_the_products() -> None:
    sim = simulate(QuantConfig.preset("aimet").with_rules(Rule(op="mul", role="activation", enabled=True)), smooth=0.5)
    assert not any(name.startswith("scales.") for name in sim.quantizers)


def test_saved_loaded_lowered_and_copied(tmp_path: Path) -> None:
    sim = simulate(smooth=0.5)
    sim.save_pretrained(tmp_path / "sim")
    lowered = sim.lower()
    lowered.save_pretrained(tmp_path / "lowered")
    expected = logits(sim.model)
    for folder in ("sim", "lowered"):
        assert torch.equal(logits(QuantSim.from_pretrained(tmp_path / folder).model), expected)
    steps = (logits(lowered.model) - expected).abs() / sim.quantizers["classifier.output"].affine_params().scale
    assert steps.max() <= 1.001
    assert sum(p.numel() for p in lowered.model.buffers()) > 0


def test_a_torch_side_aimet_file_is_refused(tmp_path: Path) -> None:
    sim = simulate(smooth=0.5)
    with pytest.raises(EncodingsError, match=r"post_training\.smooth: this model multiplies by scales\."):
        sim.export_aimet_encodings(tmp_path / "x.json")
    assert sim.export_aimet_encodings(tmp_path / "x.json", "2.0.0") == {}


def test_onnx_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
    from quantsim.formats.onnx import compare_onnx

    sim = simulate(smooth=0.5)
    sim.export_onnx(tmp_path / "model.onnx")
    parity = compare_onnx(tmp_path / "model.onnx", sim.graph, OTHERS)
    assert parity.holds
