"""Cards, and the program that lists and verifies them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_zoo import cards
from model_zoo.__main__ import main
from model_zoo.cards import Card, NotPublishedError, file_records, find, published, read_card, verify, write_card
from quantsim import CheckpointError, QuantConfig
from recipes.tasks import MODEL_CONFIGS, task_of


@pytest.fixture
def zoo(bundle: Card, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo that holds the tiny bundle."""
    monkeypatch.setattr(cards, "BUNDLES", bundle.folder.parent)
    return bundle.folder.parent


def test_what_is_written_is_read(bundle: Card, tmp_path: Path) -> None:
    write_card(bundle, tmp_path)
    assert read_card(tmp_path) == bundle
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["card.json"]


def test_a_card_knows_its_files(bundle: Card) -> None:
    verify(bundle)
    assert bundle.files == file_records(bundle.folder)
    assert set(bundle.files) == {"fp32.safetensors", "w8a8.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("seed"), "no field seed"),
        (lambda v: v.update(sed=1), "unknown field sed"),
        (lambda v: v.update(seed="5"), "seed is '5'; expected int"),
        (lambda v: v.update(seed=True), "seed is True; expected int"),
        (lambda v: v.update(metrics=[]), r"metrics is \[\]; expected dict"),
        (lambda v: v["base_model"].pop("sha256"), "base_model has no sha256"),
        (lambda v: v["metrics"].pop("ptq"), "metrics has no ptq"),
        (lambda v: v["files"].pop("w8a8.safetensors"), r"files has no w8a8\.safetensors"),
        (lambda v: v["files"].update({"../x": {"size": 1, "sha256": ""}}), r"files\.\.\./x is .*; expected a plain file name"),
    ],
)
def test_a_card_that_is_none(bundle: Card, change: Callable[[dict[str, Any]], object], message: str) -> None:
    values = json.loads(bundle.path.read_text())
    change(values)
    bundle.path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"card\.json: {message}"):
        read_card(bundle.folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_no_json(bundle: Card, text: str) -> None:
    bundle.path.write_text(text)
    with pytest.raises(CheckpointError, match=r"card\.json: (not readable as JSON|is a list)"):
        read_card(bundle.folder)


def test_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"card\.json: missing"):
        read_card(tmp_path)


def test_find(zoo: Path) -> None:
    assert published() == ["bert_w8a8_rte"]
    assert find("bert_w8a8_rte").folder == zoo / "bert_w8a8_rte"
    with pytest.raises(NotPublishedError, match=r"not published yet \(published: bert_w8a8_rte\); .*bert_qat\.py --recipe .*--task cola"):
        find("bert_w8a8_cola")


def test_a_card_in_another_s_folder(zoo: Path) -> None:
    (zoo / "bert_w8a8_rte").rename(zoo / "bert_w8a8_cola")
    with pytest.raises(CheckpointError, match="name is 'bert_w8a8_rte'; expected 'bert_w8a8_cola'"):
        find("bert_w8a8_cola")


# ---- the program ----


def test_list(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "bert_w8a8_rte" in out
    assert "accuracy 50.00" in out


def test_verify(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    (zoo / "bert_w8a8_rte" / "config.json").write_text("{}")
    assert main(["verify", "bert_w8a8_rte"]) == 2
    assert "BROKEN" in capsys.readouterr().out
    assert main(["verify", "bert_w8a8_cola"]) == 2


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "model_zoo", "verify"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what is really bundled ----


@pytest.mark.parametrize("name", published())
def test_a_bundled_checkpoint_is_what_its_card_says(name: str) -> None:
    card = find(name)
    verify(card)
    task = task_of(name)
    assert name in MODEL_CONFIGS
    assert (card.task, card.num_labels) == (task.name, task.num_labels)
    QuantConfig.from_dict(card.quantization)
    for figures in (card.metrics["fp32"], card.metrics["ptq"], card.metrics["qat"]):
        assert 0 <= figures[task.metric] <= 100
        assert figures["split"] in task.splits
        assert figures["rows"] > 0
