"""Recipes whose training split is not at hand run end to end on a part of the validation rows, as a trial that nobody can publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from model_zoo.cards import read_card, verify
from model_zoo.publish import publish_run
from quantsim import CheckpointError
from recipes import bert_qat
from recipes.tasks import TASKS
from tests.recipes.test_data import write_dataset

RECIPES = Path(__file__).parents[2] / "recipes" / "bert_w8a8"
SMALL = "--finetune.epochs 1 --qat.epochs 1 --max_length 48 --rank 2 --quantization.calibration.rows 4 --qat.fused false"
SMALL += " --quantization.compare_estimators [min_max]"  # and not mse too, which searches for seconds
WORDS = ["a cat sat", "no dog ran far", "it rained", "they left the old house"]


def rows_of(name: str) -> list[dict[str, Any]]:
    task = TASKS[name]
    if task.span:
        found = []
        for i in range(24):
            context = f"{WORDS[i % 4]} and then {WORDS[(i + 1) % 4]} in {i}"
            found.append(
                {"question": f"where {i}", "context": context, "answers": {"text": [f"in {i}"], "answer_start": [context.index(f"in {i}")]}}
            )
        return found
    return [
        {task.columns[0]: f"{WORDS[i % 4]} {i}", task.columns[1]: WORDS[(3 * i + 1) % 4], "label": i % task.num_labels} for i in range(24)
    ]


@pytest.mark.parametrize("name", ["mnli", "squad", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qnli", "qqp"))])
def test_end_to_end_on_a_part_of_the_validation_rows(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    task = TASKS[name]
    dataset = write_dataset(tmp_path / "data", task.hub_config, {task.splits[0]: rows_of(name)})
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"extends": str(RECIPES / f"{name}.yaml"), "base_model": str(base), "dataset": dataset}))
    flags = ["--recipe", str(recipe), "--output_dir", str(tmp_path / "out"), "--offline", *SMALL.split(), "--train_split", task.splits[0]]
    assert bert_qat.main(flags) == 2
    assert f"{task.splits[0]} is what {name} is measured on; give --fold too" in capsys.readouterr().err
    assert bert_qat.main([*flags, "--fold", "0", "--folds", "3"]) == 0
    card = read_card(tmp_path / "out" / "bundle")
    verify(card)
    assert set(card.estimators) == {"min_max"}
    assert task.metric in card.metrics["qat"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["recipe"]["train_split"] == task.splits[0]
    with pytest.raises(CheckpointError, match="fold"):
        publish_run(tmp_path / "out", bundles=tmp_path / "bundles")


def test_rows_of_one_context_stay_in_one_fold() -> None:
    rows = [row | {"context": f"context {i // 4}"} for i, row in enumerate(rows_of("squad"))]
    outside, inside = bert_qat.in_folds(Dataset.from_list(rows), TASKS["squad"], 3, 0)
    assert not set(outside["context"]) & set(inside["context"])
    assert len(outside) + len(inside) == 24
