"""Evaluate a model, FP32 or simulated, on encoded rows; where several processes were launched, each runs a part of the batches."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from quantsim.quantizers.processes import on_every_process
from recipes.metrics import Array, best_spans, check_finite, predictions_of, score, score_answers
from recipes.tasks import RecipeError, Task


@dataclass(frozen=True)
class Evaluation:
    """What a model said, and how good it is.

    Attributes:
        metrics: in percent, the task's headline first.
        predictions: class ids or scores ``[rows]``, or the answers' texts.
        logits: ``[rows, classes]``; for spans ``[windows, tokens, 2]``.
        rows: of the task (a span task's row has one window or more).
        seconds: of the whole pass, from the first batch to the last.
    """

    metrics: dict[str, float]
    predictions: list[Any]
    logits: Array = field(repr=False)
    rows: int
    seconds: float


def evaluate(
    model: nn.Module,
    encoded: Dataset,
    task: Task,
    *,
    rows: Dataset | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    description: str = "",
    progress: bool = True,
) -> Evaluation:
    """Run a model over all rows in their order, in eval mode and without gradients; two calls give the same bits.

    Where ``accelerate launch`` started several processes, each calls this, runs its share of the batches, and gets the logits
    of all: those that one process would get, for the batches are the same.

    Args:
        model: takes what the tokenizer gives by keyword; moved to ``device``, its mode is restored.
        encoded: of ``recipes.data.encode``, padded to one length.
        task: decides how logits become predictions and which metrics are taken.
        rows: the rows before encoding; spans need them for contexts and answers.
        batch_size: rows a forward sees.
        device: where the model runs.
        description: in front of the progress bar.
        progress: draw the bar.

    Raises:
        RecipeError: no rows, rows of unequal length, logits of another shape than the task's or not finite.
    """
    if batch_size < 1:
        raise RecipeError(f"batch size {batch_size}; expected 1 or more")
    if not len(encoded):
        raise RecipeError(f"{task.name}: no rows to evaluate")
    if task.span and rows is None:
        raise RecipeError(f"{task.name}: evaluate needs rows= with contexts and answers")
    logits, seconds = _forward(model, encoded, task, batch_size, device, description, progress)
    if task.span:
        assert rows is not None
        return _evaluate_spans(task, logits, encoded, rows, seconds)
    predictions = predictions_of(task, logits)
    metrics = score(task, predictions, encoded.with_format("numpy")["labels"][:])
    return Evaluation(metrics, predictions.tolist(), logits, len(encoded), seconds)


def _evaluate_spans(task: Task, logits: Array, encoded: Dataset, rows: Dataset, seconds: float) -> Evaluation:
    check_finite(task, logits)
    windows = encoded.with_format("numpy")
    answers = best_spans(task, logits, windows["offsets"][:], windows["example_index"][:], rows[task.columns[1]][:])
    metrics = score_answers(answers, [answer["text"] for answer in rows[task.label]])
    return Evaluation(metrics, answers, logits, len(rows), seconds)


def _forward(
    model: nn.Module, encoded: Dataset, task: Task, batch_size: int, device: str | torch.device, description: str, progress: bool
) -> tuple[Array, float]:
    """Logits of all rows ``[rows, …]`` in float32, and the seconds that it took."""
    processes = PartialState(cpu=torch.device(device).type == "cpu")
    starts = range(0, len(encoded), batch_size)
    training = model.training
    model.to(device).eval()
    began = time.perf_counter()

    def share() -> list[Array]:
        mine = starts[processes.process_index :: processes.num_processes]
        with tqdm(total=len(encoded), desc=description, unit="row", disable=not (progress and processes.is_main_process)) as bar:
            found = []
            for logits in _logits_of_batches(model, encoded, task, mine, batch_size, device):
                found.append(logits)
                bar.update(min(len(logits) * processes.num_processes, bar.total - bar.n))
        return found

    try:
        shares = on_every_process(share, RecipeError)
    finally:
        model.train(training)
    batches = [shares[i % len(shares)][i // len(shares)] for i in range(len(starts))]
    return np.concatenate(batches), time.perf_counter() - began


@torch.no_grad()
def _logits_of_batches(
    model: nn.Module, encoded: Dataset, task: Task, starts: Iterable[int], batch_size: int, device: str | torch.device
) -> Iterator[Array]:
    """Logits ``[batch, …]`` of the rows from each start on."""
    inputs = encoded.select_columns(_inputs(model, encoded)).with_format("torch")
    for start in starts:
        batch = inputs[start : start + batch_size]
        if ragged := [name for name, x in batch.items() if not isinstance(x, Tensor)]:
            raise RecipeError(f"{task.name}: rows of unequal length in {', '.join(ragged)}; encode them with padding='max_length'")
        output = model(**{name: x.to(device) for name, x in batch.items()})
        yield np.asarray(_logits(output, task).float().cpu())


def _inputs(model: nn.Module, encoded: Dataset) -> list[str]:
    """The columns that the model's forward takes, without the answers."""
    answers = ("labels", "start_positions", "end_positions")
    signature = inspect.signature(getattr(type(model), "forward", model.forward)).parameters
    return [name for name in encoded.column_names if name in signature and name not in answers]


def _logits(output: Any, task: Task) -> Tensor:
    """``[rows, classes]``, or ``[rows, tokens, 2]`` for spans."""
    names = ("start_logits", "end_logits") if task.span else ("logits",)
    if lacking := [name for name in names if name not in output]:
        raise RecipeError(f"{task.name}: the model gives {', '.join(output)} and no {lacking[0]}; it has the head of another kind of task")
    return torch.stack([output[name] for name in names], dim=-1) if task.span else output["logits"]
