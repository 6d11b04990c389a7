"""The registry: nine configs, each with what the evaluator needs to know."""

from __future__ import annotations

import pytest

from recipes.metrics import METRICS
from recipes.tasks import MODEL_CONFIGS, TASKS, RecipeError, find_task, task_of

HEADLINES = {
    "cola": "matthews",
    "sst2": "accuracy",
    "qqp": "accuracy",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "mrpc": "f1",
    "stsb": "pearson",
    "squad": "f1",
}


def test_nine_configs() -> None:
    assert set(MODEL_CONFIGS) == {f"bert_w8a8_{name}" for name in HEADLINES}


@pytest.mark.parametrize("name", HEADLINES)
def test_headline(name: str) -> None:
    assert task_of(f"bert_w8a8_{name}").metric == HEADLINES[name]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "squad"])
def test_every_metric_is_one(name: str) -> None:
    assert set(TASKS[name].metrics) <= set(METRICS)


def test_labels_and_lengths() -> None:
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {"stsb": 1, "mnli": 3}
    assert {name for name, task in TASKS.items() if task.regression} == {"stsb"}
    assert {name: task.max_length for name, task in TASKS.items() if task.max_length != 128} == {"squad": 384}
    assert TASKS["mnli"].splits == ("validation_matched", "validation_mismatched")
    assert (TASKS["squad"].stride, TASKS["squad"].n_best, TASKS["squad"].max_answer) == (128, 20, 30)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no model config 'bert_w8a8_ret'; nearest: bert_w8a8_rte"):
        task_of("bert_w8a8_ret")
    with pytest.raises(RecipeError, match=r"no task 'sst'.*nearest: sst2"):
        find_task("sst")
