"""``quant_method: "quantsim"`` in ``transformers``: load, quantize on load, save, and refuse what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertForSequenceClassification

from quantsim import CheckpointError, ConfigError, QuantConfig, QuantSim, Rule, State
from quantsim.hf import QuantSimConfig, simulation_of
from tests.formats.sealed import FILES, MODEL, TENSORS, description, edit_tensors
from tests.hf.words import tokenizer
from tests.post_training import outliers
from tests.tiny import tiny_batch, tiny_bert, tiny_sim

BATCHES = [tiny_batch(seed=seed) for seed in (1, 2)]  # what tiny_sim is calibrated with


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**tiny_batch(seed=3)).logits.clone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_sim().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in floating point."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> Tensor:
    """The logits of what lies in ``saved``."""
    return logits(load(saved))


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings)


# ---- our checkpoint ----


def test_the_auto_class_gives_the_quantized_model(saved: Path) -> None:
    model = load(saved)
    assert type(model) is BertForSequenceClassification
    assert not model.training
    assert torch.equal(logits(model), logits(tiny_sim().model))
    assert not torch.equal(logits(model), logits(tiny_bert()))
    sim = simulation_of(model)
    assert {q.state for q in sim.quantizers.values()} == {State.LEARNING}
    assert torch.equal(logits(sim.lower().model), logits(tiny_sim().lower().model))


LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
import quantsim.hf
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


def test_another_process_that_imports_the_plugin_alone(saved: Path, tmp_path: Path) -> None:
    save_file(tiny_batch(seed=3), tmp_path / "batch")
    subprocess.run([sys.executable, "-c", LOAD, str(saved), str(tmp_path / "batch"), str(tmp_path / "out")], check=True)
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(tiny_sim().model))


def test_loading_reports_nothing_amiss(saved: Path) -> None:
    _, info = load(saved, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_integers_of_a_lowered_model_become_their_values(head: str, tmp_path: Path) -> None:
    sim = tiny_sim(head)
    sim.lower().save_pretrained(tmp_path)
    auto = {"BertForMaskedLM": AutoModelForMaskedLM, "BertForSequenceClassification": AutoModelForSequenceClassification}[head]
    model = auto.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(sim.model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if head == "BertForMaskedLM":
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_save_pretrained_of_the_model_writes_what_the_simulation_writes(saved: Path, expected: Tensor, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert description(tmp_path) == description(saved)  # the hashes of all tensors among it
    assert json.loads((tmp_path / MODEL).read_text()) == json.loads((saved / MODEL).read_text())
    assert torch.equal(logits(QuantSim.from_pretrained(tmp_path).model), expected)


def test_a_checkpoint_in_parts(saved: Path, expected: Tensor, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), expected)
    assert torch.equal(logits(QuantSim.from_pretrained(tmp_path).model), expected)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="sha256 of its tensors"):
        QuantSim.from_pretrained(tmp_path)


def test_weights_with_the_names_of_old_checkpoints(plain: Path, tmp_path: Path) -> None:
    """``transformers`` reads LayerNorm.gamma and writes it again; a simulation has one name a tensor."""
    folder = Path(shutil.copytree(plain, tmp_path / "old"))
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in load_file(folder / TENSORS).items()
    }
    save_file(old, folder / TENSORS, metadata={"format": "pt"})
    model = load(folder, quantization_config=QuantSimConfig("aimet", BATCHES))
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(load(tmp_path / "new")), logits(tiny_sim().model))
    assert torch.equal(logits(QuantSim.from_pretrained(tmp_path / "new").model), logits(tiny_sim().model))


def test_dequantize_gives_the_model_back(saved: Path, plain: Path, tmp_path: Path) -> None:
    model = load(saved)
    model.dequantize()
    assert torch.equal(logits(model), logits(load(plain)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / MODEL).read_text())
    assert torch.equal(logits(load(tmp_path)), logits(load(plain)))
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="no simulated model"):
        simulation_of(model)


def test_half_precision_on_load(saved: Path, expected: Tensor) -> None:
    model = load(saved, dtype=torch.bfloat16)
    assert logits(model).dtype is torch.bfloat16
    assert {q.min.dtype for q in simulation_of(model).quantizers.values()} == {torch.float32}
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=0.3)


def test_a_config_that_is_shared_stays_that_of_both(tmp_path: Path) -> None:
    """Models often share one config: that one of them is simulated is no property of the other."""
    model, other = tiny_bert(num_hidden_layers=1), tiny_bert(num_hidden_layers=1)
    other.config = model.config
    sim = QuantSim(model, in_place=True)
    sim.model.save_pretrained(tmp_path / "simulated")
    other.save_pretrained(tmp_path / "other")
    assert "quantization_config" not in json.loads((tmp_path / "other" / MODEL).read_text())
    assert {q.state for q in simulation_of(load(tmp_path / "simulated")).quantizers.values()} == {State.OFF}


# ---- quantize on load ----


def generator() -> Iterator[dict[str, Tensor]]:
    yield from BATCHES


def callable_() -> Any:
    return lambda model: [model(**batch) for batch in BATCHES]


@pytest.mark.parametrize("data", [generator, callable_])  # tests/test_sim.py has every form of data
def test_a_model_in_floating_point_is_quantized_on_load(data: Any, plain: Path, tmp_path: Path) -> None:
    model = load(plain, quantization_config=QuantSimConfig(preset="aimet", calibration=data()))
    assert torch.equal(logits(model), logits(tiny_sim().model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_config_of_ones_own(plain: Path, tmp_path: Path) -> None:
    config = QuantConfig.preset("aimet").with_rules(Rule(module="classifier.output", set={"bits": 4}))
    model = load(plain, quantization_config=QuantSimConfig(config, BATCHES))
    model.save_pretrained(tmp_path)
    assert simulation_of(load(tmp_path)).quantizers["classifier.output"].spec.bits == 4
    assert simulation_of(load(tmp_path)).config == config


def test_without_calibration_it_says_so_and_is_calibrated_later(plain: Path) -> None:
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification is not calibrated.*calibration="):
        model = load(plain, quantization_config=QuantSimConfig())
    simulation_of(model).compute_encodings(BATCHES)
    assert torch.equal(logits(model), logits(tiny_sim().model))


def test_a_new_head_is_initialised_and_quantized(plain: Path) -> None:
    model = load(plain, num_labels=5, ignore_mismatched_sizes=True, quantization_config=QuantSimConfig("aimet", BATCHES))
    assert logits(model).shape == (4, 5)
    assert model.classifier.weight.abs().sum() > 0


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "aimett"}, "no preset 'aimett'"),
        ({"preset": "aimet", "config": {}}, "two ways to say one thing"),
        ({"bits": 4}, "bits; expected quant_method 'quantsim' and config"),
        ({"config": {"weight": None}}, "no field 'weight'"),
    ],
    ids=["preset", "both", "unknown", "field"],
)
def test_a_config_that_means_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantSimConfig(**settings)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("classifier.weight", lambda x: x * torch.nan, "classifier.weight holds 32 values that are not finite"),
        ("classifier.weight", lambda x: x[:, :3].contiguous(), r"classifier.weight is \[2, 3\]"),
        (
            "quantizers.classifier.output.max",
            lambda x: None,
            r"ranges do not fit the model; missing \['quantizers.classifier.output.max'\]",
        ),
        ("classifier.more", lambda x: torch.zeros(2), r"tensors do not fit the model.*unknown \['classifier.more'\]"),
    ],
    ids=["not finite", "shape", "missing range", "unknown"],
)
def test_tensors_that_do_not_fit_are_refused(key: str, change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    edit_tensors(folder, {key: change(load_file(folder / TENSORS).get(key))})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(b'"gelu"', b'"relu"') if name == MODEL else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{name}: .*changed or damaged"):
        load(folder)


def test_another_number_of_labels_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.\w+ is \[2"):
        load(saved, num_labels=3, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("device_map", ["auto", {"bert": "cpu", "classifier": "disk"}], ids=["auto", "disk"])
def test_several_devices_are_refused(device_map: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="one graph on one device"):
        load(saved, device_map=device_map)


def test_weights_that_are_given_are_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint, not a state_dict"):
        BertForSequenceClassification.from_pretrained(None, config=AutoConfig.from_pretrained(saved), state_dict=load_file(saved / TENSORS))


# ---- the layout of the Hub ----


def test_tokenizer_and_card_are_written_beside(tmp_path: Path) -> None:
    sim = tiny_sim()
    sim.save_pretrained(tmp_path, tokenizer=tokenizer(), metrics={"eval_accuracy": 0.75, "rows": 8})
    assert {*FILES, "README.md", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| eval_accuracy |    0.75 |" in card
    assert f"{sum(q.calibrated for q in sim.quantizers.values())} with a range" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path or id of this repository", str(tmp_path))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(logits(scope["model"]), logits(sim.model))


def test_a_metric_that_is_no_number_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics: accuracy is '75 %'; expected a number"):
        tiny_sim().save_pretrained(tmp_path / "new", metrics={"accuracy": "75 %"})  # type: ignore[dict-item]
    assert not (tmp_path / "new").exists()


def test_dequantize_gives_a_smoothed_model_back(tmp_path: Path) -> None:
    """Weights that were divided, and products that made up for it."""
    sim = outliers.simulate(smooth=0.5)
    before = logits(outliers.sick_bert())
    sim.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert any(float(x.max()) != 1 for name, x in simulation_of(loaded).graph.named_buffers() if name.startswith("scales."))
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)
