"""Every metric against a value worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recipes.metrics import (
    accuracy,
    agreement,
    answer_exact,
    answer_f1,
    f1,
    matthews,
    normalize_answer,
    pearson,
    predictions_of,
    score,
    score_answers,
    spearman,
)
from recipes.tasks import TASKS, RecipeError

SAID = np.array([1, 1, 1, 0, 0, 1])
TRUE = np.array([1, 0, 1, 0, 1, 1])  # 3 true positives, 1 false positive, 1 false negative, 1 true negative


def test_classification_by_hand() -> None:
    assert accuracy(SAID, TRUE) == pytest.approx(100 * 4 / 6)
    assert f1(SAID, TRUE) == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 1))
    assert matthews(SAID, TRUE) == pytest.approx(100 * (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_f1_is_of_class_one() -> None:
    assert f1(1 - SAID, 1 - TRUE) == pytest.approx(100 * 2 * 1 / (2 * 1 + 1 + 1))


def test_nothing_positive_is_zero_not_a_crash() -> None:
    assert f1(np.zeros(4, int), np.zeros(4, int)) == 0.0
    assert matthews(np.ones(4, int), np.array([0, 1, 0, 1])) == 0.0


def test_correlations_by_hand() -> None:
    said, true = np.array([1.0, 2.0, 3.0, 10.0], np.float32), np.array([1.0, 3.0, 2.0, 4.0], np.float32)
    # deviations from the means 4 and 2.5: (-3, -2, -1, 6) and (-1.5, 0.5, -0.5, 1.5); squared ranks' distances 0, 1, 1, 0
    assert pearson(said, true) == pytest.approx(100 * (4.5 - 1 + 0.5 + 9) / math.sqrt(50 * 5))
    assert spearman(said, true) == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_a_constant_correlates_with_nothing(metric: object) -> None:
    assert metric(np.ones(3), np.array([1.0, 2.0, 3.0])) == 0.0  # type: ignore[operator]


def test_predictions() -> None:
    logits = np.array([[0.1, 0.9], [3.0, -1.0]])
    assert predictions_of(TASKS["rte"], logits).tolist() == [1, 0]
    assert predictions_of(TASKS["stsb"], logits[:, :1]).tolist() == [0.1, 3.0]


def test_predictions_refuse_what_is_none() -> None:
    with pytest.raises(RecipeError, match=r"shape \[2, 2\]; expected \[rows, 3\]"):
        predictions_of(TASKS["mnli"], np.zeros((2, 2)))
    with pytest.raises(RecipeError, match="1 rows are not finite, row 1 first"):
        predictions_of(TASKS["rte"], np.array([[0.0, 1.0], [np.nan, 0.0]]))


def test_score_is_in_the_task_s_order() -> None:
    assert list(score(TASKS["mrpc"], SAID, TRUE)) == ["f1", "accuracy"]
    assert list(score(TASKS["stsb"], SAID + 0.5, TRUE + 0.0)) == ["pearson", "spearman"]


def test_agreement() -> None:
    assert agreement(TASKS["rte"], [0, 1, 1, 0], [0, 1, 0, 0]) == 75.0
    assert agreement(TASKS["stsb"], [1.0, 2.0], [1.5, 1.0]) == pytest.approx(0.75)
    assert agreement(TASKS["squad"], ["a b", "c"], ["a b", "C"]) == 50.0
    with pytest.raises(ValueError, match="shorter"):
        agreement(TASKS["rte"], [0, 1], [0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, an apple & a dog.", "cat apple dog"),
        ("theatre", "theatre"),
        ("A-10", "a10"),  # punctuation goes first, so its letter is no article
        ("  spaced\tout\n", "spaced out"),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_one_answer_by_hand() -> None:
    assert answer_exact("The Broncos!", "broncos") == 1.0
    assert answer_f1("Denver Broncos won", "the Denver Broncos") == pytest.approx(2 * 2 / (3 + 2))
    assert answer_f1("blue blue", "blue") == pytest.approx(2 * 1 / (2 + 1))  # a word counts as often as both have it
    assert answer_f1("blue blue", "blue blue red") == pytest.approx(2 * 2 / (2 + 3))
    assert answer_f1("red", "blue") == 0.0


def test_the_best_reference_counts() -> None:
    assert score_answers(["in 1999", "x"], [["1999", "in 1999"], ["y z"]]) == {"f1": 50.0, "exact_match": 50.0}


def test_answers_must_be_there() -> None:
    with pytest.raises(RecipeError, match="1 questions have no reference answer, row 1"):
        score_answers(["a", "b"], [["a"], []])
    with pytest.raises(RecipeError, match="1 predictions for 2 questions"):
        score_answers(["a"], [["a"], ["b"]])
