"""The three stages from end to end on a tiny base and the project's own sample, in one folder as users know it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from quantsim import QuantSim, find_floats
from recipes import ibert_finetune
from recipes.ibert_finetune import RECIPES, TASKS
from recipes.reading import read_recipe

RECIPE: dict[str, Any] = {
    "name": "ibert_rte",
    "task": "rte",
    "max_length": 24,
    "rank": 2,
    "finetune": {"lr": 1e-2, "epochs": 1, "batch": 16, "mixed_precision": "no"},
    "quantization": {"preset": "ibert", "calibration": {"rows": 8, "batch": 4}},
    "qat": {"lr": 1e-3, "epochs": 1, "batch": 16, "fused": False, "distillation": {"weight": 0.5}},
}
SMALL = ["--max_train_samples", "48", "--max_eval_samples", "16"]


def program(recipe: Path, folder: Path, stage: str, *flags: str) -> int:
    return ibert_finetune.main(["--recipe", str(recipe), "--stage", stage, "--output_dir", str(folder), "--offline", *SMALL, *flags])


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> dict[str, Path]:
    """A copy of the one folder after each stage."""
    folder, found = tmp_path_factory.mktemp("ibert"), {}
    for stage in ("full-precision", "quantize", "integer"):
        assert program(recipe, folder / "model", stage) == 0
        found[stage] = Path(shutil.copytree(folder / "model", folder / stage))
    return found


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def test_stage_1_leaves_a_model_of_transformers(stages: dict[str, Path]) -> None:
    model = BertForSequenceClassification.from_pretrained(stages["full-precision"])
    assert not getattr(model.config, "quant_mode", False)
    assert (stages["full-precision"] / "stages").is_dir()


def test_stage_2_says_quant_mode_and_keeps_the_rest_aside(stages: dict[str, Path]) -> None:
    folder = stages["quantize"]
    assert config(folder)["quant_mode"] is True
    assert not (folder / "stages").exists()
    assert list((folder / "full-precision" / "stages").glob("*/step-*/optimizer.bin"))
    assert "quant_mode" not in config(folder / "full-precision")
    before = load_file(stages["full-precision"] / "model.safetensors")
    now = load_file(folder / "model.safetensors")
    assert all(torch.equal(now[name], x) for name, x in before.items())
    assert set(json.loads((folder / "results.json").read_text())["metrics"]) == {"fp32", "quantized"}


def test_stage_3_trains_what_the_integers_compute(stages: dict[str, Path]) -> None:
    metrics = json.loads((stages["integer"] / "results.json").read_text())["metrics"]
    assert set(metrics) == {"fp32", "quantized", "integer"}
    assert metrics["integer"]["equal_to_training_form"] == metrics["integer"]["rows"] == 16
    weights, start = (load_file(folder / "model.safetensors") for folder in (stages["integer"], stages["integer"] / "quantized"))
    assert not torch.equal(weights["classifier.weight"], start["classifier.weight"])
    sim = QuantSim.from_pretrained(stages["integer"])
    batch = {"input_ids": torch.randint(5, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert find_floats(sim.integer_only().graph, batch) == []


def test_stage_3_again_trains_nothing(stages: dict[str, Path], recipe: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(stages["integer"], tmp_path / "again"))
    assert program(recipe, again, "integer") == 0
    before, now = (load_file(folder / "model.safetensors") for folder in (stages["integer"], again))
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert len(list((again / "stages").iterdir())) == 1


def test_a_checkpoint_of_trainer_is_quantized_in_place(stages: dict[str, Path], recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    BertForSequenceClassification.from_pretrained(stages["full-precision"]).save_pretrained(folder)
    shutil.copy(stages["full-precision"] / "tokenizer.json", folder)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (folder / name).write_text("state")
    assert program(recipe, folder, "quantize") == 0
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= {
        path.name for path in (folder / "full-precision").iterdir()
    }
    assert not list(folder.glob("*.pt"))
    assert config(folder)["quant_mode"] is True


def test_flags_of_run_glue_are_fields_of_the_stage(recipe: Path) -> None:
    flags = ["--recipe", str(recipe), "--learning_rate", "1e-6", "--num_train_epochs", "12", "--max_seq_length", "32", "--seed", "7"]
    integer, _ = ibert_finetune.parse([*flags, "--stage", "integer"])
    assert (integer.qat.lr, integer.qat.epochs, integer.max_length, integer.seed) == (1e-6, 12.0, 32, 7)
    first, _ = ibert_finetune.parse([*flags, "--stage", "full-precision", "--per_device_train_batch_size", "4"])
    assert (first.finetune.lr, first.finetune.batch, first.qat.lr) == (1e-6, 4, 1e-3)


@pytest.mark.parametrize(
    "stage, flags, message",
    [
        ("quantize", [], "holds no fine-tuned model. Run --stage full-precision first"),
        ("integer", [], "holds no quantized model (quant_mode: true in config.json); run --stage quantize first"),
        ("quantize", ["--model_name_or_path", "/nowhere/at/all"], "cannot be read"),
        ("full-precision", ["--task", "rte"], "give --task or --recipe, and not both"),
        ("full-precision", ["--finetune.lrr", "1"], "finetune.lrr: no such field"),
    ],
    ids=["nothing to quantize", "nothing to train", "no such model", "two recipes", "no such field"],
)
def test_what_means_nothing_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, flags: list[str], message: str
) -> None:
    assert program(recipe, tmp_path, stage, *flags) == 2
    assert message in capsys.readouterr().err


def test_trained_work_is_not_overwritten(stages: dict[str, Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(stages["integer"], tmp_path / "model"))
    for stage, message in (("full-precision", "holds a quantized model"), ("quantize", "holds a model that stage integer trained")):
        assert program(recipe, folder, stage) == 2
        assert message in capsys.readouterr().err


def test_an_uncalibrated_model_is_refused(
    stages: dict[str, Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim = QuantSim(BertForSequenceClassification.from_pretrained(stages["full-precision"]), "ibert")
    sim.model.config.quant_mode = True
    sim.save_pretrained(tmp_path / "start")
    assert program(recipe, tmp_path / "out", "integer", "--model_name_or_path", str(tmp_path / "start")) == 2
    assert "its quantizer is off; call compute_encodings" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_recipe_is_one(task: str) -> None:
    recipe = read_recipe(RECIPES / f"{task}.yaml")
    assert (recipe.task, recipe.name, recipe.quantization.preset) == (task, f"ibert_{task}", "ibert")
    assert recipe.qat.mixed_precision == "no"
