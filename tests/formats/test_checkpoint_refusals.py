"""A damaged or hostile checkpoint is refused with the name of the file and the reason, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantsim import CheckpointError, QuantSim
from tests.formats.sealed import FILES, MODEL, TENSORS, describe, description, edit, edit_tensors, write
from tests.tiny import tiny_sim

HEAD = "BertForTokenClassification"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_sim(HEAD).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        QuantSim.from_pretrained(folder)


# ---- damage ----


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, rf"{name}: missing")


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere/config\.json: missing")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    refused(folder, rf"{name}: .*(safetensors|JSON|sha256)")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(folder: Path, name: str) -> None:
    """In 60 places drawn at random, the first and the last byte among them."""
    path = folder / name
    data, draw = path.read_bytes(), random.Random(0)
    for place in [0, len(data) - 2, *draw.sample(range(len(data) - 1), 58)]:
        bit = 1 << draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        if name == MODEL and same_json(path.read_bytes(), data):
            continue  # white space
        refused(folder, rf"{name}: ")


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_a_change_that_would_load_as_well(folder: Path) -> None:
    """Another version, written by hand: nothing but the header's own hash can tell."""
    write(folder, load_file(folder / TENSORS), description(folder) | {"versions": {"torch": "9.9"}})
    refused(folder, rf"{TENSORS}: .*own sha256")


@pytest.mark.parametrize("sealed", [False, True], ids=["hash as it was", "hash repaired"])
@pytest.mark.parametrize("key", ["classifier.weight", "quantizers.classifier.output.max"])
def test_a_renamed_key(folder: Path, key: str, sealed: bool) -> None:
    edit_tensors(folder, {key: None, f"{key}_": load_file(folder / TENSORS)[key]}, sealed)
    refused(folder, rf"{TENSORS}: .*{key}" if sealed else rf"{TENSORS}: sha256")


@pytest.mark.parametrize("sealed", [False, True], ids=["hash as it was", "hash repaired"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["quantizers.classifier.output.max", "quantizers.classifier.weight.min", "classifier.weight"])
def test_a_number_that_is_not_finite(folder: Path, key: str, value: float, sealed: bool) -> None:
    x = load_file(folder / TENSORS)[key]
    x.view(-1)[0] = value
    edit_tensors(folder, {key: x}, sealed)
    refused(folder, rf"{TENSORS}: {key} .*not finite")


# ---- files that were made for another model, or by hand: their hashes are right ----


@pytest.mark.parametrize("key", ["classifier.weight", "quantizers.classifier.weight.min"])
def test_a_wrong_shape(folder: Path, key: str) -> None:
    edit_tensors(folder, {key: torch.zeros(3, 5)})
    refused(folder, rf"{TENSORS}: {key} .*\[3, 5\].*expected")


@pytest.mark.parametrize("key", ["classifier.weight", "quantizers.classifier.output.max"])
def test_a_wrong_dtype(folder: Path, key: str) -> None:
    edit_tensors(folder, {key: load_file(folder / TENSORS)[key].to(torch.int32)})
    refused(folder, rf"{TENSORS}: {key} .*int32.*expected")


@pytest.mark.parametrize("key", ["more.weight", "quantizers.more.min"])
def test_a_tensor_too_many(folder: Path, key: str) -> None:
    edit_tensors(folder, {key: torch.zeros(3)})
    refused(folder, rf"{TENSORS}: .*{key}")


@pytest.mark.parametrize("name", ["BertForEverything", "os", "PreTrainedModel", "", None, 3])
def test_an_unknown_architecture(folder: Path, name: object) -> None:
    describe(folder, architecture=name)
    refused(folder, rf"{TENSORS}: .*architecture {name!r}")


def test_an_architecture_of_another_family(folder: Path) -> None:
    describe(folder, architecture="RobertaForTokenClassification")
    refused(folder, "copy/")


@pytest.mark.parametrize(("field", "value"), [("bits", 99), ("estimator", "best"), ("more", 1)])
def test_a_config_that_means_nothing(folder: Path, field: str, value: object) -> None:
    quantization = json.loads((folder / MODEL).read_text())["quantization_config"]
    quantization["config"]["activations"][field] = value
    edit(folder, quantization_config=quantization)
    refused(folder, rf"{MODEL}: quantization_config\.config: .*{field}")


@pytest.mark.parametrize("method", [None, "gptq", 3])
def test_the_config_of_another_method(folder: Path, method: object) -> None:
    edit(folder, quantization_config={"quant_method": method})
    refused(folder, rf"{MODEL}: quantization_config\.quant_method is {method!r}; expected 'quantsim'")


@pytest.mark.parametrize("spec", [{"bits": 3}, None, "x"], ids=repr)
def test_a_quantizer_that_does_not_fit(folder: Path, spec: object) -> None:
    describe(folder, quantizers=description(folder)["quantizers"] | {"classifier.output": spec})
    refused(folder, rf"{TENSORS}: quantizers\.classifier\.output is")


@pytest.mark.parametrize("code", [torch.tensor(9, dtype=torch.uint8), torch.tensor(2), torch.zeros(2, dtype=torch.uint8)], ids=repr)
def test_a_state_that_there_is_not(folder: Path, code: torch.Tensor) -> None:
    edit_tensors(folder, {"quantizers.classifier.output.state_code": code})
    refused(folder, rf"{TENSORS}: quantizers\.classifier\.output\.state_code is")


@pytest.mark.parametrize("value", [{}, [], "x"], ids=repr)
def test_quantizers_that_are_not_those_of_the_model(folder: Path, value: object) -> None:
    describe(folder, quantizers=value)
    refused(folder, rf"{TENSORS}: .*quantizers")


@pytest.mark.parametrize("field", ["tied", "sha256", "quantizers", "format"])
@pytest.mark.parametrize("value", [None, 3, [1]], ids=repr)
def test_a_field_of_the_wrong_kind(folder: Path, field: str, value: object) -> None:
    describe(folder, **{field: value})
    refused(folder, rf"{TENSORS}: .*{field}")


@pytest.mark.parametrize("text", ["3", "[]", "null", '"x"'])
def test_a_description_that_is_no_object(folder: Path, text: str) -> None:
    write(folder, load_file(folder / TENSORS), json.loads(text))
    refused(folder, rf"{TENSORS}: quantsim: expected an object")


def test_weights_of_another_program(folder: Path) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"format": "pt"})
    refused(folder, rf"{TENSORS}: its header has \['format'\]; expected format and quantsim")


@pytest.mark.parametrize("change", [{"model_type": "nonsense"}, {"model_type": None}, {"hidden_size": -1}, {"hidden_size": "16"}], ids=repr)
def test_a_model_config_that_builds_nothing(folder: Path, change: dict[str, object]) -> None:
    edit(folder, **change)
    refused(folder, rf"{MODEL}")


# ---- harm ----


class Touch:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_in_place_of_safetensors_is_not_executed(folder: Path, tmp_path: Path, form: str) -> None:
    trap = Touch(tmp_path / "sprung")
    if form == "pickle":
        (folder / TENSORS).write_bytes(pickle.dumps(trap))
    else:
        torch.save({"classifier.weight": trap}, folder / TENSORS)
    refused(folder, rf"{TENSORS}: not a whole safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_the_safetensors_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "sprung")))
    (folder / TENSORS).unlink()
    refused(folder, rf"{TENSORS}: missing")
    assert not (tmp_path / "sprung").exists()


def test_code_that_the_model_config_names_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto_map`` is how a Hub repository asks for its own Python files to be imported; nobody is asked at the prompt either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass EvilConfig: pass\n")
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refused(folder, rf"{MODEL}")
    assert not (tmp_path / "sprung").exists()
