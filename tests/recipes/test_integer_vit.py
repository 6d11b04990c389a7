"""A vision transformer in integers, for a few steps: what is trained, measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

from quantsim import IntegerTraining
from recipes import integer_vit
from recipes.integer_vit import KNOWN_BEFORE, digits, main, new_model

FEW = ["--epochs", "0.1", "--no-fused"]


def test_the_digits_are_shared_out_evenly_and_always_alike() -> None:
    train, held_out = digits()
    assert (len(train), len(held_out)) == (1437, 360)
    counts = torch.bincount(torch.tensor([row["labels"] for row in held_out]))
    assert counts.min() >= 34
    assert train[0]["pixel_values"].shape == (1, 8, 8)
    assert -1 <= min(row["pixel_values"].min() for row in train) < max(row["pixel_values"].max() for row in train) <= 1
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(held_out, digits()[1], strict=True))


def test_every_linear_norm_and_the_patch_convolution_are_in_integers() -> None:
    training = IntegerTraining(new_model(0))
    listed = {d.name: d.form for d in training.decisions if d.op in ("linear", "layer_norm", "conv2d")}
    assert len(listed) == 1 + 4 * 8 + 2  # the patches; four layers of six linears and two norms; the last norm and the classifier
    assert "vit.embeddings.patch_embeddings.projection.output" in listed
    assert None not in listed.values()


@pytest.mark.parametrize("start", ["scratch", "fine-tuned"])
def test_it_trains_measures_and_writes(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--start", start, "--output_dir", str(tmp_path)]) == 0
    assert "integers 8-8-8" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written["metrics"]) == {"integers 8-8-8", "float"}
    assert written["integer"]["gradient_bits"] == 8
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.num_labels == 10
    stages = sorted(path.name.partition("-")[0] for path in (tmp_path / "stages").iterdir())
    assert stages == (["finetune"] if start == "scratch" else ["finetune", "pretrain"])


def test_what_was_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*FEW, "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    before = json.loads((tmp_path / "results.json").read_text())["metrics"]

    def refused(*_: object) -> None:
        raise AssertionError("a step was trained again")

    monkeypatch.setattr(integer_vit, "label_loss", refused)
    assert main(flags) == 0
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == before


def test_fine_tuning_starts_from_half_of_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    monkeypatch.setattr(integer_vit, "train", lambda job: seen.update({job.title: {row["labels"] for row in job.rows}}))
    assert main([*FEW, "--start", "fine-tuned", "--output_dir", str(tmp_path)]) == 0
    assert seen == {"pretrain": set(range(KNOWN_BEFORE)), "finetune": set(range(10))}


@pytest.mark.parametrize(
    "flags, message", [(["--weight_bits", "3"], "weight_bits"), (["--epochs", "0"], "epochs"), (["--keep_float", "none.such"], "none.such")]
)
def test_bad_input(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
