"""The nine tasks, as data: which columns a task reads, what it predicts, and how the prediction is scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quantsim.config import near

Kind = Literal["classification", "regression", "span"]

GLUE = "nyu-mll/glue"
SQUAD = "rajpurkar/squad"


class RecipeError(ValueError):
    """Something that the user can set right: the message says what was wrong, where, and what to do."""


@dataclass(frozen=True)
class Task:
    """One task of GLUE, or SQuAD v1.1.

    Attributes:
        name: ``"rte"``; also the dataset's configuration on the Hub, but for SQuAD (see ``hub_config``).
        columns: the text columns in the order the tokenizer takes them.
        metrics: names of ``recipes.metrics``, in percent; the first is the headline.
        num_labels: classes; 1 for regression, 2 (start and end) for spans.
        kind: what the model predicts.
        label: the column with the answer.
        least: of the numbers of a regression.
        splits: what is evaluated, each reported apart.
        max_length: rows are padded and cut to this many tokens.
        stride: tokens that two windows of one long context share (spans).
        n_best: start and end candidates that are paired (spans).
        max_answer: the longest answer, in tokens (spans).
        hub_id: the dataset on the Hub.
        hub_config: its configuration.

    >>> TASKS["mrpc"].metric
    'f1'
    """

    name: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    num_labels: int = 2
    kind: Kind = "classification"
    label: str = "label"
    least: float = -math.inf
    splits: tuple[str, ...] = ("validation",)
    max_length: int = 128
    stride: int = 128
    n_best: int = 20
    max_answer: int = 30
    hub_id: str = GLUE
    hub_config: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hub_config", self.hub_config or self.name)

    @property
    def metric(self) -> str:
        """The headline metric."""
        return self.metrics[0]

    @property
    def regression(self) -> bool:
        return self.kind == "regression"

    @property
    def span(self) -> bool:
        return self.kind == "span"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("rte", ("sentence1", "sentence2"), ("accuracy",)),
        Task("stsb", ("sentence1", "sentence2"), ("pearson", "spearman"), num_labels=1, kind="regression", least=0),
        Task("mrpc", ("sentence1", "sentence2"), ("f1", "accuracy")),
        Task("cola", ("sentence",), ("matthews",)),
        Task("sst2", ("sentence",), ("accuracy",)),
        Task("qnli", ("question", "sentence"), ("accuracy",)),
        Task("qqp", ("question1", "question2"), ("accuracy", "f1")),
        Task("mnli", ("premise", "hypothesis"), ("accuracy",), num_labels=3, splits=("validation_matched", "validation_mismatched")),
        Task(
            "squad",
            ("question", "context"),
            ("f1", "exact_match"),
            kind="span",
            label="answers",
            max_length=384,
            hub_id=SQUAD,
            hub_config="plain_text",
        ),
    )
}

PREFIX = "bert_w8a8_"
MODEL_CONFIGS: tuple[str, ...] = tuple(PREFIX + name for name in TASKS)


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        RecipeError: no such task.
    """
    if name not in TASKS:
        raise RecipeError(f"no task {name!r}; the tasks are {', '.join(TASKS)} (nearest: {near(name, TASKS, 1)})")
    return TASKS[name]


def task_of(model_config: str) -> Task:
    """The task of a model config.

    Raises:
        RecipeError: no such config.

    >>> task_of("bert_w8a8_stsb").regression
    True
    """
    if model_config not in MODEL_CONFIGS:
        raise RecipeError(
            f"no model config {model_config!r}; nearest: {near(model_config, MODEL_CONFIGS)}. All of them: {', '.join(MODEL_CONFIGS)}"
        )
    return TASKS[model_config.removeprefix(PREFIX)]
