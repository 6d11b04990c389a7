"""A recipe over seeds: one folder a seed, one summary, in each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_zoo.cards import read_card
from model_zoo.format import check_sweep
from recipes import sweep
from recipes.sweep import summary
from tests.recipes.test_bert_qat import files  # noqa: F401


def test_two_seeds_of_a_tiny_recipe(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    flags = ["--recipe", str(files / "rte.yaml"), "--output_dir", str(tmp_path), "--seeds", "3", "4", "--offline", "--max_steps", "2"]
    assert sweep.main([*flags, "--qat.fused", "false", "--intermediate", "null"]) == 0
    cards = [read_card(tmp_path / f"seed-{seed}" / "bundle") for seed in (3, 4)]
    assert [card.seed for card in cards] == [3, 4]
    assert cards[0].files["w8a8.safetensors"] != cards[1].files["w8a8.safetensors"]
    found = [json.loads((tmp_path / f"seed-{seed}" / "sweep.json").read_text()) for seed in (3, 4)]
    assert found[0] == found[1] == summary([3, 4], [card.metrics for card in cards], "accuracy")
    assert "median" in capsys.readouterr().out


def test_the_summary_is_what_a_card_takes() -> None:
    metrics = [{what: {"f1": value} for what in ("fp32", "ptq", "qat")} for value in (80.0, 90.0, 86.0, 84.0)]
    found = summary([1, 2, 3, 4], metrics, "f1")
    assert found["qat"] == {"values": [80.0, 90.0, 86.0, 84.0], "median": 85.0, "least": 80.0, "greatest": 90.0}
    check_sweep("here", found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "fp32"], "--stage fp32: writes no bundle"),
        (["--seeds", "1", "1"], "--seeds 1 1: expected each once"),
        (["--qat.lrr", "1"], "no such field; nearest: qat.lr"),
        (["--qat.lr", "{"], "--qat.lr {: no YAML"),
        (["--device", "nowhere"], "--device nowhere: cannot be used here"),
    ],
)
def test_mistakes_are_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:  # noqa: F811
    assert sweep.main(["--recipe", str(files / "rte.yaml"), "--output_dir", str(tmp_path), "--offline", *flags]) == 2
    assert message in capsys.readouterr().err
