"""Checkpoints: what is saved comes back bit for bit, in another process, and a failed save leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import BertForSequenceClassification

from quantsim import QuantConfig, QuantSim, Rule, State
from quantsim.formats import checkpoint
from quantsim.formats.checkpoint import CheckpointError
from tests.formats.sealed import FILES, MODEL, TENSORS, description
from tests.rewrites.test_insert_quantizers import LowRank
from tests.tiny import tiny_batch, tiny_bert, tiny_config, tiny_sim

LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from quantsim import QuantSim
torch.set_num_threads(1)
sim = QuantSim.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": sim.model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


@torch.no_grad()
def logits(sim: QuantSim) -> torch.Tensor:
    return sim.model.eval()(**tiny_batch(seed=3)).logits.clone()


def test_another_process_gives_bitwise_equal_logits(tmp_path: Path) -> None:
    sim = tiny_sim()
    sim.model(**tiny_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    torch.optim.SGD(sim.model.parameters(), lr=0.1).step()  # weights and ranges that no calibration would give
    sim.save_pretrained(tmp_path / "saved")
    save_file(tiny_batch(seed=3), tmp_path / "batch.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "saved", tmp_path / "batch.safetensors", tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], logits(sim))


def test_everything_a_simulation_holds_comes_back(tmp_path: Path) -> None:
    config = QuantConfig.preset("bondarenko").with_rules(Rule(op="gelu", set={"bits": 4}), Rule(op="softmax", enabled=False, reason="x"))
    sim = tiny_sim("BertForTokenClassification", config)
    sim.quantizers["classifier.output"].state = State.OFF
    sim.quantizers["classifier.weight"].state = State.FIXED
    sim.save_pretrained(tmp_path)
    loaded = QuantSim.from_pretrained(tmp_path)
    assert type(loaded.model) is type(sim.model)
    assert loaded.config == config
    assert [(p.name, p.spec, p.reason) for p in loaded.placements] == [(p.name, p.spec, p.reason) for p in sim.placements]
    for name, q in sim.quantizers.items():
        other = loaded.quantizers[name]
        assert (other.state, other.min.requires_grad) == (q.state, q.state is State.LEARNING), name
        assert torch.equal(other.min, q.min)
        assert torch.equal(other.max, q.max)
    assert torch.equal(logits(loaded), logits(sim))
    assert not loaded.model.training


def test_an_uncalibrated_simulation_comes_back_uncalibrated(tmp_path: Path) -> None:
    tiny_sim("BertForTokenClassification", calibrated=False).save_pretrained(tmp_path)
    assert {q.state for q in QuantSim.from_pretrained(tmp_path).quantizers.values()} == {State.OFF}


def test_a_tied_weight_is_written_once_and_comes_back_tied(tmp_path: Path) -> None:
    sim = tiny_sim("BertForMaskedLM")
    sim.save_pretrained(tmp_path)
    names = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert len(names & set(load_file(tmp_path / TENSORS))) == 1
    loaded = QuantSim.from_pretrained(tmp_path)
    assert loaded.model.cls.predictions.decoder.weight is loaded.model.bert.embeddings.word_embeddings.weight
    assert torch.equal(logits(loaded), logits(sim))


def test_a_computed_weight_is_written_as_its_value(tmp_path: Path) -> None:
    model = tiny_bert(num_hidden_layers=1)
    dense = model.bert.encoder.layer[0].output.dense
    parametrize.register_parametrization(dense, "weight", LowRank(16, 32))
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path)
    saved = load_file(tmp_path / TENSORS)
    assert torch.equal(saved["bert.encoder.layer.0.output.dense.weight"], dense.weight)
    assert not [name for name in saved if "parametrizations" in name]
    assert torch.equal(logits(QuantSim.from_pretrained(tmp_path)), logits(sim))


class OwnHead(BertForSequenceClassification):
    """A class that ``transformers`` does not have."""


def test_a_class_of_ones_own_is_loaded_into_an_instance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = QuantSim(OwnHead(tiny_config(num_hidden_layers=1)).eval())
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*'OwnHead'.*model="):
        QuantSim.from_pretrained(tmp_path)
    loaded = QuantSim.from_pretrained(tmp_path, OwnHead(tiny_config(num_hidden_layers=1)))
    assert torch.equal(logits(loaded), logits(sim))


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    tiny_sim("BertForTokenClassification").save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    QuantSim.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


# ---- what is written ----


def test_the_folder_holds_these_files_and_no_pickle(tmp_path: Path) -> None:
    tiny_sim().save_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(FILES)


def test_header_and_config_say_what_it_is_in_plain_json(tmp_path: Path) -> None:
    sim = tiny_sim()
    sim.save_pretrained(tmp_path)
    header, values = description(tmp_path), json.loads((tmp_path / MODEL).read_text())
    assert header["architecture"] == "BertForSequenceClassification"
    assert header["quantizers"].keys() == sim.quantizers.keys()
    assert values["architectures"] == ["BertForSequenceClassification"]
    assert values["quantization_config"]["quant_method"] == "quantsim"
    assert QuantConfig.from_dict(values["quantization_config"]["config"]) == sim.config


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path) -> None:
    sim = tiny_sim("BertForTokenClassification")
    sim.save_pretrained(tmp_path)
    with torch.no_grad():
        sim.model.classifier.bias.add_(1)
    sim.save_pretrained(tmp_path)
    assert torch.equal(logits(QuantSim.from_pretrained(tmp_path)), logits(sim))


# ---- a save that fails ----

STEPS = ["save_file", "_write_text", "contents"]


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_save_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(step, monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        tiny_sim().save_pretrained(tmp_path / "new")
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_save_leaves_the_checkpoint_that_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = tiny_sim()
    sim.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fail_at(step, monkeypatch)
    with torch.no_grad():
        sim.model.classifier.bias.add_(1)
    with pytest.raises(OSError, match="disk full"):
        sim.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def fail_at(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        for path in (arg for arg in args if isinstance(arg, Path)):
            if path.suffix == ".safetensors":
                path.write_bytes(b"half a file")
        raise OSError("disk full")

    if step == "save_file":
        monkeypatch.setattr(checkpoint.safetensors.torch, step, fail)
    else:
        monkeypatch.setattr(checkpoint, step, fail)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="taken: is a file"):
        tiny_sim().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    sim = tiny_sim()
    config, before = sim.model.config.to_dict(), logits(sim)
    sim.save_pretrained(tmp_path)
    assert torch.equal(logits(sim), before)
    noted = ("architectures", "dtype")
    assert {k: v for k, v in sim.model.config.to_dict().items() if k not in noted} == {k: v for k, v in config.items() if k not in noted}
    assert isinstance(sim.model, nn.Module)
    assert json.loads((tmp_path / MODEL).read_text())["model_type"] == "bert"
