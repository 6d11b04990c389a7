"""Scores, from numpy arrays to percent. Pure functions; scikit-learn and scipy do the arithmetic."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipes.tasks import RecipeError, Task

Array = NDArray[Any]


# ---- classification and regression ----


def accuracy(predictions: Array, labels: Array) -> float:
    return 100.0 * float(accuracy_score(labels, predictions))


def f1(predictions: Array, labels: Array) -> float:
    """F1 of class 1; 0 where neither side has a 1."""
    return 100.0 * float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0))


def matthews(predictions: Array, labels: Array) -> float:
    return 100.0 * float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Array, labels: Array) -> float:
    """Linear correlation; 0 where one side is constant and there is nothing to correlate."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: Array, labels: Array) -> float:
    """Correlation of ranks; 0 where one side is constant."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(function: Callable[..., Any], predictions: Array, labels: Array) -> float:
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return 100.0 * float(function(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def predictions_of(task: Task, logits: Array) -> Array:
    """What the model says: ``[rows, classes]`` → class ids ``[rows]``; ``[rows, 1]`` → scores ``[rows]``.

    Raises:
        RecipeError: logits that are not finite, or of another width than the task has labels.
    """
    if logits.ndim != 2 or logits.shape[1] != task.num_labels:
        raise RecipeError(f"{task.name}: the model gives logits of shape {list(logits.shape)}; expected [rows, {task.num_labels}]")
    check_finite(task, logits)
    return logits[:, 0] if task.regression else logits.argmax(axis=1)


def check_finite(task: Task, logits: Array) -> None:
    if bad := np.flatnonzero(~np.isfinite(logits).reshape(len(logits), -1).all(axis=1)).tolist():
        raise RecipeError(
            f"{task.name}: logits of {len(bad)} rows are not finite, row {bad[0]} first; the checkpoint or its ranges are broken"
        )


def score(task: Task, predictions: Array, labels: Array) -> dict[str, float]:
    """The task's metrics by name, in percent; the headline first.

    >>> from recipes.tasks import TASKS
    >>> score(TASKS["rte"], np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    {'accuracy': 75.0}
    """
    return {name: METRICS[name](predictions, labels) for name in task.metrics}


def agreement(task: Task, a: Sequence[Any] | Array, b: Sequence[Any] | Array) -> float:
    """How near two lists of predictions are: percent that are equal, or for regression the mean absolute difference."""
    if task.regression:
        return float(np.abs(np.asarray(a) - np.asarray(b)).mean())
    return 100.0 * float(np.mean([x == y for x, y in zip(a, b, strict=True)]))


# ---- SQuAD ----


def normalize_answer(text: str) -> str:
    """What is compared: lower case, no punctuation, no articles, single spaces (Rajpurkar et al., 2016).

    >>> normalize_answer("The  Quick, brown fox!")
    'quick brown fox'
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def answer_exact(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def answer_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words that both share, counted as often as both have them."""
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * shared / (len(ours) + len(theirs)) if shared else 0.0


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match in percent, each question against the reference answer that suits it best.

    Raises:
        RecipeError: a question without reference answers, or another number of predictions.
    """
    if len(predictions) != len(answers):
        raise RecipeError(f"squad: {len(predictions)} predictions for {len(answers)} questions")
    if unanswered := [i for i, texts in enumerate(answers) if not texts]:
        raise RecipeError(
            f"squad: {len(unanswered)} questions have no reference answer, row {unanswered[0]} first; this is SQuAD v1.1, not v2"
        )
    pairs = list(zip(predictions, answers, strict=True))
    f1s = [max(answer_f1(said, text) for text in texts) for said, texts in pairs]
    exacts = [max(answer_exact(said, text) for text in texts) for said, texts in pairs]
    return {"f1": 100.0 * float(np.mean(f1s)), "exact_match": 100.0 * float(np.mean(exacts))}


def best_spans(task: Task, logits: Array, offsets: Array, example_index: Array, contexts: Sequence[str]) -> list[str]:
    """The answer to each question: the span with the highest sum of start and end logit over all windows of its context.

    Per window the ``n_best`` best starts and ends are paired; a pair counts if both are in the context, the end is not
    before the start, and it is at most ``max_answer`` tokens long. Ties go to the earlier window and the better start.

    Args:
        task: for ``n_best`` and ``max_answer``.
        logits: ``[windows, tokens, 2]``, start and end.
        offsets: ``[windows, tokens, 2]``, first and last + 1 character of each token in its context; −1 outside of it.
        example_index: ``[windows]``, the row that a window comes from.
        contexts: the text of each row.

    Returns:
        One string a row; empty where no span counts.
    """
    best: dict[int, tuple[float, str]] = {}
    for window, row in enumerate(example_index.tolist()):
        found = _best_in_window(task, logits[window], offsets[window])
        if found is not None and (row not in best or found[0] > best[row][0]):
            total, first, last = found
            best[row] = (total, contexts[row][first:last])
    return [best[row][1] if row in best else "" for row in range(len(contexts))]


def _best_in_window(task: Task, logits: Array, offsets: Array) -> tuple[float, int, int] | None:
    """The best score with its first and last character: logits ``[tokens, 2]``, offsets ``[tokens, 2]``."""
    starts, ends = (np.argsort(-logits[:, side], kind="stable")[: task.n_best] for side in (0, 1))  # [n_best] each
    length = ends[None, :] - starts[:, None] + 1  # [n_best starts, n_best ends]
    inside = (offsets[starts, 0] >= 0)[:, None] & (offsets[ends, 0] >= 0)[None, :]
    valid = inside & (length >= 1) & (length <= task.max_answer)
    if not valid.any():
        return None
    totals = np.where(valid, logits[starts, 0][:, None] + logits[ends, 1][None, :], -np.inf)
    start, end = np.unravel_index(int(totals.argmax()), totals.shape)
    return float(totals[start, end]), int(offsets[starts[start], 0]), int(offsets[ends[end], 1])
