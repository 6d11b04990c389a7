"""The program from end to end on a tiny base: it trains in integers, goes on where it was killed, and refuses what means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from quantsim.rewrites.integer_training.config import OPERANDS
from recipes import integer_finetune
from recipes.integer_finetune import RECIPES, TASKS
from recipes.reading import read_recipe
from tests.recipes.test_bert_qat import rows
from tests.recipes.test_two_processes import launch

RECIPE: dict[str, Any] = {
    "name": "integer_rte",
    "task": "rte",
    "max_length": 24,
    "method": "full",
    "finetune": {"lr": 1e-2, "epochs": 2, "batch": 8, "mixed_precision": "no"},
    "qat": {"lr": 1e-3, "epochs": 1, "batch": 8},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A recipe and 24 + 9 rows of RTE's form in the Hub's layout."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "glue" / "rte").mkdir(parents=True)
    splits: dict[str, Dataset] = {"train": rows(24, ("sentence1", "sentence2"), 2), "validation": rows(9, ("sentence1", "sentence2"), 2)}
    for split, found in splits.items():
        found.to_parquet(folder / "glue" / "rte" / f"{split}.parquet")
    paths = [{"split": split, "path": f"rte/{split}.parquet"} for split in splits]
    header = {"configs": [{"config_name": "rte", "data_files": paths}]}
    (folder / "glue" / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")
    (folder / "rte.yaml").write_text(yaml.safe_dump({**RECIPE, "base_model": str(base), "dataset": str(folder / "glue")}))
    return folder


def program(files: Path, folder: Path, *flags: str) -> int:
    return integer_finetune.main(["--recipe", str(files / "rte.yaml"), "--output_dir", str(folder), "--offline", "--no-fused", *flags])


def losses(folder: Path) -> list[float]:
    (log,) = folder.glob("stages/finetune-*/log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_it_trains_in_integers_and_writes_the_fp32_weights(files: Path, tmp_path: Path) -> None:
    assert program(files, tmp_path, "--weight_bits", "8", "--gradient_bits", "12", "--finetune.epochs", "6") == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written["metrics"]) == {"integers 8-8-12", "float"}
    assert written["integer"]["gradient_bits"] == 12
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.classifier.weight.isfinite().all()


def test_a_run_that_was_stopped_ends_with_the_same_weights(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers are those of the step, so a resumed run is the run."""
    assert program(files, tmp_path / "whole", "--save_steps", "1") == 0
    monkeypatch.setattr("recipes.training._Run._log", stop_after_an_epoch)
    with pytest.raises(KeyboardInterrupt):
        program(files, tmp_path / "stopped", "--save_steps", "1")
    monkeypatch.undo()
    assert program(files, tmp_path / "stopped", "--save_steps", "1") == 0
    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_two_processes_train_as_one_does(files: Path, tmp_path: Path) -> None:
    """Each maps the gradient of its half of the batch: at 16 bits and to the nearest, within 1e-4 of a step of 1e-2 each.

    A key's bias moves no logit: its gradient is 0, and what rounding makes of it is anything.
    """
    flags = [*(f"--{what}_bits=16" for what in OPERANDS), "--gradient_rounding", "nearest", "--finetune.epochs", "1"]
    flags += ["--finetune.hidden_dropout", "0", "--finetune.attention_dropout", "0"]  # it is drawn by each process for its rows
    assert program(files, tmp_path / "one", *flags) == 0
    where = ["--recipe", str(files / "rte.yaml"), "--output_dir", str(tmp_path / "two"), "--offline", "--no-fused"]
    printed = launch("recipes/integer_finetune.py", *where, *flags)
    assert printed.count("integers 16-16-16: accuracy") == 1
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def stop_after_an_epoch(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_bits_and_float_are_stages_of_their_own(files: Path, tmp_path: Path) -> None:
    assert program(files, tmp_path, "--float", "--max_steps", "1") == 0
    assert set(json.loads((tmp_path / "results.json").read_text())["metrics"]) == {"float"}
    for flags in (["--weight_bits", "6"], ["--ops", "linear"]):
        assert program(files, tmp_path, "--max_steps", "1", *flags) == 0
    assert len(list((tmp_path / "stages").iterdir())) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weight_bits", "2"], "weight_bits: 2; expected an integer from 4 to 16"),
        (["--keep_float", "clasifier.*"], "keep_float: 'clasifier.*' matches no op"),
        (["--finetune.lrr", "1"], "finetune.lrr: no such field"),
        (["--task", "rte"], "give --task or --recipe, and not both"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_means_nothing_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert program(files, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_recipe_is_one(task: str) -> None:
    recipe = read_recipe(RECIPES / f"{task}.yaml")
    assert (recipe.task, recipe.name, recipe.method) == (task, f"integer_{task}", "full")
    assert recipe.finetune.mixed_precision == "no"
