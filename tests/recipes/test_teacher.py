"""Edited copies of rows: so many of each, one small edit in one text, the same for the same seed."""

from __future__ import annotations

from datasets import Dataset

from recipes.tasks import TASKS
from recipes.teacher import edited

ROWS = Dataset.from_list(
    [
        {"sentence1": "The cats were asleep in the garden.", "sentence2": "Nobody saw them.", "label": 1, "idx": 0},
        {"sentence1": "She told herself a story.", "sentence2": "Stop!", "label": 0, "idx": 1},
    ]
)


def test_each_copy_has_one_edit_in_one_text() -> None:
    found = edited(ROWS, TASKS["rte"], 5, seed=1)
    assert len(found) == 10
    assert found["label"][:] == [1, 0] * 5
    for i, row in enumerate(found):
        changed = [name for name in ("sentence1", "sentence2") if row[name] != ROWS[i % 2][name]]
        assert len(changed) == 1 or row["sentence2"] == "Stop!"  # one word cannot be edited
    assert len({row["sentence1"] for row in found}) > 3


def test_the_seed_decides() -> None:
    first, again, other = (edited(ROWS, TASKS["rte"], 3, seed)["sentence1"][:] for seed in (1, 1, 2))
    assert first == again != other


def test_no_copies_are_no_rows() -> None:
    assert len(edited(ROWS, TASKS["rte"], 0, seed=1)) == 0
