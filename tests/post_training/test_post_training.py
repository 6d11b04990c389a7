"""Post-training as options of calibration: together, from JSON, saved, lowered, and when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from quantsim import CalibrationError, CheckpointError, ConfigError, IntegerError, PostTraining, QuantConfig, QuantSim, Rule
from quantsim.config import QuantSpec
from quantsim.hf import QuantSimConfig
from quantsim.sim import calibration
from tests.formats.sealed import TENSORS, edit_tensors
from tests.post_training.outliers import BATCHES, logits, noise, sick_bert, simulate

ALL = {"smooth": 0.5, "adaround": 20, "bias_correction": True}


def test_all_together_saved_loaded_and_lowered(tmp_path: Path) -> None:
    sim = simulate(**ALL)
    expected = logits(sim.model)
    lowered = sim.lower()
    sim.save_pretrained(tmp_path / "sim")
    lowered.save_pretrained(tmp_path / "lowered")
    for folder in ("sim", "lowered"):
        again = QuantSim.from_pretrained(tmp_path / folder)
        assert again.config == sim.config
        assert torch.equal(logits(again.model), expected)
    steps = (logits(lowered.model) - expected).abs() / sim.quantizers["classifier.output"].affine_params().scale
    assert steps.max() <= 1.001


@pytest.mark.parametrize("rules", [(), (Rule(op="residual", role="activation", set={"axis": -1, "groups": 3}),)], ids=["tensor", "groups"])
def test_sums_stay_exact_and_integers_alone_take_one_range(rules: tuple[Rule, ...]) -> None:
    sim = simulate(QuantConfig.preset("aimet").with_rules(*rules), **ALL)
    assert torch.equal(logits(sim.lower(exact=True).model), logits(sim.model))
    if rules:
        with pytest.raises(IntegerError, match=r"in 3 groups by range \(axis -1\); an edge of the integer graph has one scale"):
            sim.integer_only()
    else:
        assert logits(sim.integer_only().model).isfinite().all()


def test_transformers_loads_and_saves_scales_and_groups(tmp_path: Path) -> None:
    grouped = QuantConfig.preset("aimet").with_rules(Rule(op="gelu", role="activation", set={"axis": -1, "groups": 3}))
    sim = simulate(grouped, **ALL)
    sim.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    for model in (loaded, again, QuantSim.from_pretrained(tmp_path / "theirs").model):
        assert torch.equal(logits(model), logits(sim.model))


def test_transformers_calibrates_with_them_on_load(tmp_path: Path) -> None:
    sick_bert().save_pretrained(tmp_path)  # type: ignore[operator]
    config = replace(QuantConfig.preset("aimet"), post_training=PostTraining(**ALL))
    given = QuantSimConfig(config, calibration=BATCHES)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=given)
    assert torch.equal(logits(model), logits(simulate(**ALL).model))


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    simulate(smooth=0.5).save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / TENSORS) if name.startswith("scales."))
    edit_tensors(tmp_path, {name: torch.ones(31)})
    with pytest.raises(CheckpointError, match=r"scales\..*\.scale is \[31\] of torch.float32; expected \[32\]"):
        QuantSim.from_pretrained(tmp_path)
    edit_tensors(tmp_path, {name: None})
    with pytest.raises(CheckpointError, match="scales do not fit the model; missing"):
        QuantSim.from_pretrained(tmp_path)


def test_all_together_help() -> None:
    assert noise(simulate(**ALL)) < 0.3 * noise(simulate())


def test_a_step_of_training_reaches_every_weight_and_range() -> None:
    sim = simulate(**ALL)
    sim.model(**BATCHES[0], labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    assert [name for name, p in sim.model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_callable_gives_what_its_batches_give() -> None:
    sim = QuantSim(sick_bert(), replace(QuantConfig.preset("aimet"), post_training=PostTraining(**ALL)))
    sim.compute_encodings(lambda model, batches: [model(**batch) for batch in batches], BATCHES)
    assert torch.equal(logits(sim.model), logits(simulate(**ALL).model))


def test_a_generator_is_gone_over_as_often_as_needed() -> None:
    sim = QuantSim(sick_bert(), replace(QuantConfig.preset("aimet"), post_training=PostTraining(**ALL)))
    sim.compute_encodings(batch for batch in BATCHES)
    assert torch.equal(logits(sim.model), logits(simulate(**ALL).model))


def test_a_callable_that_never_calls_is_an_error() -> None:
    sim = QuantSim(sick_bert(), replace(QuantConfig.preset("aimet"), post_training=PostTraining(**ALL)))
    with pytest.raises(CalibrationError, match="never called the model"):
        sim.compute_encodings(lambda model: None)


def test_a_calibration_that_fails_leaves_weights_and_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulate(**ALL)
    before = {k: v.clone() for k, v in sim.model.state_dict().items()}

    def fails(*_: Any, **__: Any) -> None:
        sim.model.get_parameter("classifier.bias").data.add_(1)
        raise CalibrationError("in the middle")

    monkeypatch.setattr(calibration, "adjust_layers", fails)
    with pytest.raises(CalibrationError, match="in the middle"):
        sim.compute_encodings([BATCHES[2]])
    assert all(torch.equal(before[k], v) for k, v in sim.model.state_dict().items())


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulate(bias_correction=True)
    monkeypatch.setattr(calibration, "world_size", lambda: 2)
    with pytest.raises(CalibrationError, match="expected one process, 2 run"):
        sim.compute_encodings(BATCHES)


def test_a_quarter_of_the_model_is_all_that_a_user_has_to_know() -> None:
    """The config is data: JSON in and out, and nothing is written where nothing was asked for."""
    config = replace(QuantConfig.preset("aimet"), post_training=PostTraining(**ALL))
    assert json.loads(json.dumps(config.to_dict()))["post_training"] == ALL
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "post_training" not in QuantConfig.preset("aimet").to_dict()
    assert QuantSpec().to_dict() == QuantConfig.preset("aimet").to_dict()["activations"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smooth": 1.5}, r"PostTraining\.smooth: 1\.5; expected a number from 0 to 1"),
        ({"smooth": True}, r"PostTraining\.smooth"),
        ({"adaround": -1}, r"PostTraining\.adaround: -1"),
        ({"adaround": 1.0}, r"PostTraining\.adaround"),
        ({"bias_correction": 1}, r"PostTraining\.bias_correction"),
        ({"biases": True}, "no field 'biases'"),
        ({"post": {}}, "no field 'post'"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PostTraining.from_dict(values)


def test_a_config_takes_a_post_training_alone() -> None:
    with pytest.raises(ConfigError, match=r"QuantConfig\.post_training"):
        QuantConfig(post_training={"smooth": 0.5})  # type: ignore[arg-type]
