"""Both commands from end to end on a tiny base and the project's own sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantsim import LoweringError, QuantSim, State
from quantsim.formats.checkpoint import read_checkpoint
from recipes import q8bert
from recipes.q8bert import RECIPES, TASKS, load_int8
from recipes.reading import read_recipe

RECIPE: dict[str, Any] = {
    "name": "q8bert_rte",
    "task": "rte",
    "max_length": 24,
    "method": "full",
    "finetune": {"lr": 1e-2, "epochs": 2, "batch": 16, "mixed_precision": "no"},
    "quantization": {"preset": "q8bert", "calibration": {"rows": 8, "batch": 4}},
    "qat": {"lr": 1e-3, "epochs": 1, "batch": 8},
}
SMALL = ["--max_train_samples", "48", "--max_eval_samples", "16"]


def program(recipe: Path, *flags: str) -> int:
    return q8bert.main(["--recipe", str(recipe), "--model_type", "quant_bert", "--do_lower_case", "--offline", *SMALL, *flags])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = tmp_path_factory.mktemp("q8bert") / "model"
    assert program(recipe, "--do_train", "--evaluate_during_training", "--output_dir", str(folder)) == 0
    return folder


def test_training_leaves_fp32_to_go_on_with_and_int8_for_inference(output: Path) -> None:
    assert {x.dtype for name, x in load_file(output / "model.safetensors").items() if not name.startswith("quantizers.")} == {torch.float32}
    stored = read_checkpoint(output / "int8").integers()
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= stored
    written = json.loads((output / "results.json").read_text())
    assert set(written["metrics"]) == {"q8bert", "int8"}
    (log,) = output.glob("stages/q8bert-*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("eval_accuracy" in line for line in lines) == 2  # once an epoch


def test_the_int8_model_refuses_to_be_trained(output: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoweringError, match=r"a lowered model is for inference: its weights are integers"):
        load_int8(output).train()
    assert program(recipe, "--do_train", "--model_name_or_path", str(output / "int8"), "--output_dir", str(output / "x")) == 2
    assert "holds integers, for inference alone" in capsys.readouterr().err


def test_the_fp32_model_goes_on_training(output: Path, recipe: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(output), "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert program(recipe, "--do_train", *flags) == 0
    before, after = (load_file(folder / "model.safetensors")["classifier.weight"] for folder in (output, tmp_path))
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 0.05  # one step from where it was


@pytest.mark.parametrize("quantized", [True, False], ids=["int8", "simulated"])
def test_inference_finds_what_training_measured(output: Path, recipe: Path, tmp_path: Path, quantized: bool) -> None:
    folder = Path(shutil.copytree(output, tmp_path / "model"))
    flags = ["--model_path", str(folder), "--evaluate", "--output_dir", str(tmp_path / "out")]
    assert program(recipe, *flags, *(["--load_quantized_model"] if quantized else [])) == 0
    predictions = (tmp_path / "out" / "predictions.txt").read_text().split()
    assert len(predictions) == 16
    assert set(predictions) <= {"0", "1"}


def test_int8_and_simulation_agree(output: Path) -> None:
    batch = {"input_ids": torch.randint(5, 40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    with torch.no_grad():
        simulated = QuantSim.from_pretrained(output).model(**batch).logits
        int8 = load_int8(output)(**batch).logits
    assert (simulated - int8).abs().max() < 0.02 * simulated.abs().max()


def test_quantizers_that_never_started_are_calibrated(output: Path) -> None:
    """Six steps are fewer than the head's start_step of 200."""
    states = {quantizer.state for quantizer in QuantSim.from_pretrained(output).quantizers.values()}
    assert states == {State.FOLLOWING}


@pytest.mark.parametrize("mode", ["dynamic", "none"])
def test_other_modes(recipe: Path, tmp_path: Path, mode: str) -> None:
    assert program(recipe, "--do_train", "--mode", mode, "--max_steps", "2", "--output_dir", str(tmp_path)) == 0
    sim = QuantSim.from_pretrained(tmp_path)
    follows = {quantizer.spec.follow for name, quantizer in sim.quantizers.items() if not name.endswith("weight")}
    assert follows == ({"dynamic"} if mode == "dynamic" else set())


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --do_train, or --model_path"),
        (["--do_train", "--load_quantized_model"], "are for inference alone"),
        (["--task_name", "rte"], "give --task_name or --recipe, and not both"),
        (["--model_path", "nowhere", "--load_quantized_model"], "nowhere has no int8 folder"),
    ],
    ids=["nothing to do", "training integers", "two recipes", "no int8 model"],
)
def test_what_means_nothing_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert program(recipe, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_recipe_is_one(task: str) -> None:
    recipe = read_recipe(RECIPES / f"{task}.yaml")
    assert (recipe.task, recipe.name, recipe.method, recipe.quantization.preset) == (task, f"q8bert_{task}", "full", "q8bert")
