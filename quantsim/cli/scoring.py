"""Rows of one's own as a task that the recipes' evaluator scores: which columns, which labels, which metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from quantsim.cli.command import CommandError
from quantsim.cli.data import LABELS, Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

    from recipes.tasks import Task

QUESTION_COLUMNS, ANSWERS = ("question", "context"), "answers"
QUESTION_LENGTH = 384


def own_task(model: nn.Module, columns: tuple[str, ...], label: str) -> Task:
    """The task that a model's head is for, on columns of one's own.

    Two classes are scored by accuracy, F1 of class 1 and Matthews; more by accuracy and Matthews; one by correlation.

    Raises:
        CommandError: a head that has no score here.
    """
    from recipes.tasks import Task

    name = type(model).__name__
    if asks(model):
        both = columns if len(columns) == 2 else QUESTION_COLUMNS
        return Task(name, both, ("f1", "exact_match"), kind="span", label=label, max_length=QUESTION_LENGTH)
    if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        raise CommandError(
            f"{name}: only heads of sequence classification, regression and question answering are scored; "
            "--unlabelled compares its outputs with those of the floating-point model"
        )
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    if classes == 1:
        return Task(name, columns, ("pearson", "spearman"), num_labels=1, kind="regression", label=label)
    metrics = ("accuracy", "f1", "matthews") if classes == 2 else ("accuracy", "matthews")
    return Task(name, columns, metrics, num_labels=classes, label=label)


def asks(model: nn.Module) -> bool:
    """Whether the model finds answers in a context."""
    return type(model).__name__ in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values()


def label_column(given: str | None, data: Data) -> str:
    """The column that was named, or ``label`` or ``labels``.

    Raises:
        CommandError: there is none.
    """
    for name in [given] if given else LABELS:
        if name in data.rows.column_names:
            return name
    what = repr(given) if given else "'label'"
    raise CommandError(
        f"{data.source}: no column {what}; name the one with the answers by --label ({', '.join(data.rows.column_names)}), "
        "or compare without answers by --unlabelled"
    )


def with_class_numbers(rows: Dataset, label: str, config: PreTrainedConfig, source: object) -> Dataset:
    """Labels as the model numbers its classes: names become numbers, and numbers of named classes follow the names.

    A dataset and a model may number the same classes differently; where both name them alike, names decide.

    Raises:
        CommandError: a name that the model does not have.
    """
    numbers = {str(name).lower(): int(number) for number, name in (config.id2label or {}).items()}
    names = getattr(rows.features[label], "names", None)  # of datasets.ClassLabel
    values = rows[label][:]
    if names is not None and {name.lower() for name in names} == set(numbers):
        values = [names[value] if value in range(len(names)) else value for value in values]
    if not any(isinstance(value, str) for value in values):
        return rows
    found = [_number(value, numbers, i, label, source) for i, value in enumerate(values)]
    return rows.remove_columns(label).add_column(label, found)


def _number(value: Any, numbers: dict[str, int], row: int, label: str, source: object) -> Any:
    if isinstance(value, str) and value.lower() not in numbers:
        raise CommandError(
            f"{source}: row {row}: {label} is {value!r}; the model's classes are {', '.join(numbers)} (id2label of its config)"
        )
    return numbers[value.lower()] if isinstance(value, str) else value
