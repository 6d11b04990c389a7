"""From start and end logits to an answer's text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recipes.metrics import best_spans
from recipes.tasks import TASKS

SQUAD = TASKS["squad"]
CONTEXT = "alpha beta gamma delta"
#            [CLS]     question  [SEP]     alpha   beta     gamma     delta
OFFSETS = [(-1, -1), (-1, -1), (-1, -1), (0, 5), (6, 10), (11, 16), (17, 22)]


def span(logits: list[tuple[float, float]], task: object = SQUAD) -> str:
    (answer,) = best_spans(task, np.array([logits]), np.array([OFFSETS]), np.array([0]), [CONTEXT])  # type: ignore[arg-type]
    return answer


def test_the_best_sum_wins() -> None:
    assert span([(0, 0), (0, 0), (0, 0), (1, 0), (5, 0), (0, 4), (0, 1)]) == "beta gamma"


def test_not_outside_of_the_context() -> None:
    assert span([(99, 99), (50, 50), (0, 0), (0, 0), (1, 0), (0, 0), (0, 1)]) == "beta gamma delta"


def test_not_backwards() -> None:
    assert span([(0, 0), (0, 0), (0, 0), (0, 9), (0, 0), (8, 0), (0, 0)]) == "alpha"  # 0 + 9, where 8 + 9 runs backwards


def test_not_too_long() -> None:
    logits = [(0, 0), (0, 0), (0, 0), (5, 0), (1, 0), (0, 0), (0, 5)]
    assert span(logits) == CONTEXT
    assert span(logits, replace(SQUAD, max_answer=3)) == "beta gamma delta"


def test_only_the_n_best_are_paired() -> None:
    logits = [(9, 9), (8, 8), (0, 0), (1, 1), (0, 0), (0, 0), (0, 0)]
    assert span(logits, replace(SQUAD, n_best=2)) == ""  # both are outside
    assert span(logits, replace(SQUAD, n_best=3)) == "alpha"


def test_the_best_window_of_a_row() -> None:
    weak = np.zeros((7, 2))
    weak[3] = 1.0
    strong = np.zeros((7, 2))
    strong[5] = 2.0
    other = np.zeros((7, 2))
    other[6] = 9.0
    answers = best_spans(
        SQUAD, np.stack([weak, strong, other]), np.array([OFFSETS] * 3), np.array([0, 0, 2]), [CONTEXT, "no window", CONTEXT.upper()]
    )
    assert answers == ["gamma", "", "DELTA"]


@pytest.mark.parametrize("seed", range(20))
def test_equals_trying_every_pair(seed: int) -> None:
    generator = np.random.default_rng(seed)
    task = replace(SQUAD, max_answer=3, n_best=7)
    logits = generator.normal(size=(7, 2))
    pairs = [(i, j) for i in range(3, 7) for j in range(i, min(i + 3, 7))]
    first, last = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
    assert span(logits.tolist(), task) == CONTEXT[OFFSETS[first][0] : OFFSETS[last][1]]
