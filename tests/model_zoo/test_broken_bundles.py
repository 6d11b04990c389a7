"""A bundle that is not whole, not the card's, or not this model's is refused by file and field, and never executed."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model_zoo.bundle import apply_delta, load_float, load_simulation
from model_zoo.cards import Card, verify
from model_zoo.format import CONFIG, FP32, W8A8
from quantsim import CheckpointError
from tests.model_zoo.tiny_bundle import LINEAR, rehash, rewrite
from tests.tiny import tiny_bert, tiny_sim

UP, DOWN = f"{LINEAR}.low_rank.up", f"{LINEAR}.low_rank.down"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


# ---- the card's hashes ----


@pytest.mark.parametrize("file", [FP32, W8A8, CONFIG])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes; card.json expects"),
        (flip, "sha256 is [0-9a-f]{64}; card.json expects"),
        (pickled, "card.json expects"),
        (Path.unlink, "missing"),
    ],
)
def test_a_file_that_is_not_the_card_s(bundle: Card, file: str, damage: Callable[[Path], None], message: str) -> None:
    damage(bundle.folder / file)
    load = load_float if file == FP32 else load_simulation
    for check in (verify, load):
        with pytest.raises(CheckpointError, match=re.escape(file) + ".*" + message):
            check(bundle)  # type: ignore[operator]


def test_a_file_too_many(bundle: Card) -> None:
    (bundle.folder / "more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds more\.bin, which card\.json does not list"):
        verify(bundle)


# ---- files whose hash is right ----


@pytest.mark.parametrize("damage", [truncate, pickled], ids=["truncated", "pickle"])
def test_no_safetensors(bundle: Card, damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage(bundle.folder / FP32)
    with pytest.raises(CheckpointError, match=r"fp32\.safetensors: not a whole safetensors file .*Nothing in it was executed"):
        load_float(rehash(bundle))
    assert not (tmp_path / "executed").exists()


def test_values_that_are_not_finite(bundle: Card) -> None:
    path = bundle.folder / W8A8
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if name.startswith("quantizers."))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"w8a8\.safetensors: {re.escape(name)} holds \d+ values that are not finite"):
        load_simulation(rehash(bundle))


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({"classifier.bias": torch.zeros(3)}, (), r"classifier\.bias is \[3\] of torch\.float32; the model has \[2\]"),
        (
            {"classifier.bias": torch.zeros(2).bfloat16()},
            (),
            r"classifier\.bias is \[2\] of torch\.bfloat16; the model has \[2\] of torch\.float32",
        ),
        ({"clasifier.bias": torch.zeros(2)}, (), r"no weight clasifier\.bias \(nearest: classifier\.bias\)"),
        ({UP: torch.zeros(8, 2)}, (), r"query\.weight\.low_rank\.up @ low_rank\.down is \[8, 16\]"),
        ({DOWN: torch.zeros(2, 16).double()}, (), r"low_rank\.down is .*float64"),
        ({}, ("classifier.bias",), r"no tensor classifier\.bias, and the base model has none either"),
    ],
    ids=["shape", "dtype", "name", "factor-shape", "factor-dtype", "head-missing"],
)
def test_weights_that_do_not_fit(bundle: Card, changes: dict[str, torch.Tensor], drop: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"fp32\.safetensors: .*{message}"):
        load_float(rewrite(bundle, FP32, changes, drop))


RANGE = "quantizers.bert.pooler.activation.output"


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({}, (f"{RANGE}.min",), r"missing \['bert\.pooler\.activation\.output\.min'\] \(1\), unknown none"),
        ({"quantizers.nowhere.min": torch.zeros(())}, (), r"missing none \(0\), unknown \['nowhere\.min'\] \(1\)"),
        ({f"{RANGE}.min": torch.zeros(3)}, (), r"output\.min is \[3\] of torch\.float32; the model has \[\]"),
        ({f"{RANGE}.min": torch.tensor(0)}, (), r"output\.min is \[\] of torch\.int64"),
        ({f"{RANGE}.min": torch.tensor(9e9)}, (), r"output\.min is above \.max in 1 of 1"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "reversed"],
)
def test_ranges_that_do_not_fit(
    bundle: Card, changes: dict[str, torch.Tensor], drop: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_zoo.bundle.QuantSim", lambda *_, **__: tiny_sim(calibrated=False))  # traced once, not five times
    with pytest.raises(CheckpointError, match=rf"w8a8\.safetensors: .*{message}"):
        load_simulation(rewrite(bundle, W8A8, changes, drop))


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    model = tiny_bert()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    safetensors.torch.save_file({"classifier.bias": torch.ones(2), "classifier.weight": torch.ones(1)}, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[1\]"):
        apply_delta(model, tmp_path / "delta")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- what stands beside the files ----


def test_another_base(bundle: Card, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"base model .*sha256 of its weights is"):
        load_float(bundle, lambda _: str(tmp_path / "base"))


def test_no_base(bundle: Card, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(CheckpointError, match=r"base model .* cannot be read .*made by the tests"):
        load_float(bundle, lambda _: str(tmp_path / "base"))


def test_a_config_that_is_no_model_s(bundle: Card) -> None:
    path = bundle.folder / CONFIG
    path.write_text(path.read_text().replace("BertForSequenceClassification", "QuantSim"))
    with pytest.raises(CheckpointError, match=r"config\.json: architectures is \['QuantSim'\]"):
        load_float(rehash(bundle))


def test_a_quantization_that_means_nothing(bundle: Card) -> None:
    card = replace(bundle, quantization={**bundle.quantization, "weights": {"bits": 99}})
    with pytest.raises(CheckpointError, match=r"card\.json: quantization: QuantSpec\.bits: 99"):
        load_simulation(card)
