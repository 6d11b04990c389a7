"""Rows of a task, from a folder, the Hub, or the project's own sample; and rows → what a model takes."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from transformers import PreTrainedTokenizerBase

from recipes.hub import go_offline, hub_reachable
from recipes.tasks import RecipeError, Task

SAMPLES = Path(__file__).resolve().parents[1] / "model_zoo" / "samples"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class DataError(RecipeError):
    """Rows that are not there, or not what the task needs."""


class MissingSplitError(DataError):
    """A dataset without this split."""


@dataclass(frozen=True)
class DataSource:
    """Where rows come from.

    Attributes:
        name: the folder, the Hub id, or the sample's file name.
        kind: ``"dataset"`` (a folder), ``"hub"`` or ``"sample"``.
        split: the split, or ``"sample"``.
        note: what a reader of the result has to know; empty where there is nothing.
    """

    name: str
    kind: Literal["dataset", "hub", "sample"]
    split: str
    note: str = ""

    @property
    def label(self) -> str:
        """The split in a word or two, for a table; a sample says that it is one."""
        return "own sample" if self.kind == "sample" else self.split

    def __str__(self) -> str:
        return f"{self.name}, {self.split}" + (f" ({self.note})" if self.note else "")


# ---- load ----


def load_rows(
    task: Task, dataset: str | None = None, split: str | None = None, *, offline: bool = False, max_rows: int | None = None
) -> tuple[Dataset, DataSource]:
    """The rows of one split of a task.

    Args:
        task: whose columns are needed and checked.
        dataset: a folder in the Hub's layout, or a Hub id; by default the task's own on the Hub, and where the Hub cannot
            be reached the bundled sample, with a warning.
        split: the task's first evaluation split by default.
        offline: never ask the Hub.
        max_rows: only the first so many.

    Raises:
        DataError: a folder, dataset, split, column, label or sample that is missing; no rows.
    """
    split = split or task.splits[0]
    if offline:
        go_offline()
    if dataset is not None:
        rows, source = _from_dataset(task, dataset, split)
    else:
        rows, source = _from_hub_or_sample(task, split)
    check_rows(task, rows, source)
    if max_rows is not None:
        if max_rows < 1:
            raise DataError(f"{task.name}: {max_rows} rows asked for; expected 1 or more")
        rows = rows.select(range(min(max_rows, len(rows))))
    return rows, source


def _from_dataset(task: Task, dataset: str, split: str) -> tuple[Dataset, DataSource]:
    if Path(dataset).is_dir():
        return _split_of(_load(dataset, task), dataset, split), DataSource(dataset, "dataset", split)
    if not HUB_ID.fullmatch(dataset):
        raise DataError(f"{dataset}: no such folder, and no Hub id (owner/name) either; give one of the two, or leave it out")
    note = "" if hub_reachable() else "the Hub's, from this machine's cache"
    return _split_of(_load(dataset, task), dataset, split), DataSource(dataset, "hub", split, note)


def _from_hub_or_sample(task: Task, split: str) -> tuple[Dataset, DataSource]:
    try:
        return _from_dataset(task, task.hub_id, split)  # without a Hub: a copy that an earlier run left in the cache
    except DataError:
        if hub_reachable() or split not in task.splits:  # a sample is there to be evaluated, not to be trained on
            raise
        return load_sample(task)


def load_sample(task: Task) -> tuple[Dataset, DataSource]:
    """The project's own sample of a task, and a warning on stderr that it is one.

    Raises:
        DataError: the task has none, or the file is broken.
    """
    path = SAMPLES / f"{task.name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{task.name}: the Hub cannot be reached and the project bundles no sample of this task; "
            f"give --dataset with a folder in the layout of {task.hub_id}, or go online"
        )
    try:
        rows = Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: not readable as JSON lines ({error}); restore the file") from error
    print(
        f"\nWARNING: the Hub cannot be reached. These are {len(rows)} rows of the project's own sample ({path.name}),\n"
        f"NOT {_benchmark(task)}: the figures below show that everything works and compare with nothing published.\n"
        "Give --dataset for the real rows.\n",
        file=sys.stderr,
    )
    return rows, DataSource(path.name, "sample", "sample", f"the project's own sentences, not {_benchmark(task)}")


def _benchmark(task: Task) -> str:
    return "SQuAD" if task.span else "GLUE"


def _load(name: str, task: Task) -> DatasetDict:
    try:
        with _no_bars():
            return load_dataset(name, task.hub_config)
    except Exception as error:  # datasets, the Hub, pyarrow: each has its own family of them
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: cannot load the configuration {task.hub_config!r} ({type(error).__name__}: {reason})") from error


def _split_of(found: DatasetDict, name: str, split: str) -> Dataset:
    if split not in found:
        raise MissingSplitError(f"{name}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def check_rows(task: Task, rows: Dataset, source: DataSource) -> None:
    """Refuse rows that the task cannot use: none at all, a column that is missing, text or a label that is not one.

    Raises:
        DataError: naming the source, the column and the row.
    """
    if not len(rows):
        raise DataError(f"{source}: no rows")
    if missing := [name for name in (*task.columns, task.label) if name not in rows.column_names]:
        raise DataError(f"{source}: no column {', '.join(map(repr, missing))} for {task.name}; it has {', '.join(rows.column_names)}")
    for name in task.columns:
        for i, text in enumerate(rows[name]):
            if not isinstance(text, str):
                raise DataError(f"{source}: row {i}: {name} is {text!r}; expected text")
    for i, label in enumerate(rows[task.label]):
        if not _is_label(task, label):
            raise DataError(f"{source}: row {i}: {task.label} is {label!r}; expected {_labels(task)}. Test splits have no labels")


def _is_label(task: Task, label: Any) -> bool:
    if task.span:
        return isinstance(label, dict) and bool(label.get("text")) and len(label["text"]) == len(label.get("answer_start") or ())
    if isinstance(label, bool) or not isinstance(label, int | float):
        return False
    return math.isfinite(label) and label >= task.least if task.regression else label in range(task.num_labels)


def _labels(task: Task) -> str:
    if task.span:
        return "answers with text and answer_start"
    number = "a number" if math.isinf(task.least) else f"a number from {task.least:g}"
    return number if task.regression else f"an integer from 0 to {task.num_labels - 1}"


def rows_sha256(task: Task, rows: Dataset) -> str:
    """A hash of the texts and labels in their order: equal for equal rows, wherever they come from."""
    digest = hashlib.sha256()
    for row in rows.select_columns([*task.columns, task.label]):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


# ---- encode ----


def encode(
    rows: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    padding: str | bool = "max_length",
) -> Dataset:
    """Rows → token ids and labels, in torch format.

    Args:
        rows: of :func:`load_rows`.
        task: says which columns, and what a label is.
        tokenizer: the base model's.
        max_length: rows are cut to it, the task's by default.
        padding: ``"max_length"``, or ``False`` for a collator that pads batch by batch. With a clamped mask a row's logits
            depend on how far it is padded, so what is reported is padded to one length.

    Returns:
        ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the tokenizer gives them) of ``[tokens]`` each, and
        ``labels`` (float32 for regression). For spans one row a window of the context, with ``start_positions`` and
        ``end_positions``; ``example_index`` and ``offsets`` are kept outside of the torch format for ``best_spans``.
    """
    length = max_length or task.max_length
    if task.span:
        return _encode_spans(rows, task, tokenizer, length, padding)

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in task.columns]
        return {**tokenizer(*texts, truncation=True, max_length=length, padding=padding), "labels": batch[task.label]}

    encoded = _map(rows, encode_batch)
    label = Value("float32") if task.regression else Value("int64")
    with _no_bars():
        return encoded.cast(Features({**encoded.features, "labels": label})).with_format("torch")


def _encode_spans(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, length: int, padding: str | bool) -> Dataset:
    question, context = task.columns

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        encoded = tokenizer(
            [text.lstrip() for text in batch[question]],
            batch[context],
            truncation="only_second",
            max_length=length,
            stride=min(task.stride, length // 3),
            padding=padding,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found: dict[str, list[Any]] = {name: list(encoded[name]) for name in tokenizer.model_input_names if name in encoded}
        extra: dict[str, list[Any]] = {name: [] for name in ("example_index", "offsets", "start_positions", "end_positions")}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            outside = (-1, -1)
            sides = encoded.sequence_ids(window)
            offsets = [pair if side == 1 else outside for pair, side in zip(encoded["offset_mapping"][window], sides, strict=True)]
            start, end = _token_span(batch[task.label][row], offsets)
            for name, value in zip(extra, (indices[row], offsets, start, end), strict=True):
                extra[name].append(value)
        return found | extra

    encoded = _map(rows, encode_batch, with_indices=True)
    tensors = [name for name in encoded.column_names if name not in ("example_index", "offsets")]
    return encoded.with_format("torch", columns=tensors)


def _token_span(answers: dict[str, list[Any]], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer in a window, or 0 and 0 (the first token) where the window lacks it."""
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])
    start = next((i for i, (low, high) in enumerate(offsets) if low <= first < high), None)
    end = next((i for i, (low, high) in enumerate(offsets) if low < last <= high), None)
    return (0, 0) if start is None or end is None else (start, end)


def _map(rows: Dataset, function: Any, **options: Any) -> Dataset:
    """``Dataset.map`` in memory, so that no cache can be stale."""
    with _no_bars():
        return rows.map(
            function, batched=True, remove_columns=rows.column_names, keep_in_memory=True, load_from_cache_file=False, **options
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of ``datasets``: the only bar is the evaluation's."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
