"""Broken copies of sentences: one edit each, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from datasets import Dataset

from recipes.real_or_fake import CLOSED, broken, real_or_fake
from recipes.tasks import TASKS

TEXTS = [
    "The cats were asleep in the garden all day.",
    "She told herself that nobody had noticed the mistake.",
    "Nobody knows which of these letters was written first.",
    "too short",
    "word " * 30,
]
ROWS = Dataset.from_list([{"premise": text, "hypothesis": TEXTS[0], "label": 0} for text in TEXTS])


def test_pairs_of_a_sentence_and_its_broken_copy() -> None:
    found = real_or_fake(ROWS, TASKS["mnli"], seed=1)
    assert found["label"][:] == [1, 0] * 3  # each text once, none too short or too long
    assert [text for text, label in zip(found["sentence"], found["label"], strict=True) if label] == TEXTS[:3]
    assert found["sentence"][:] == real_or_fake(ROWS, TASKS["mnli"], seed=1)["sentence"][:]
    assert found["sentence"][:] != real_or_fake(ROWS, TASKS["mnli"], seed=2)["sentence"][:]


@pytest.mark.parametrize("text", TEXTS[:3])
def test_one_edit_changes_at_most_a_word_or_the_order(text: str) -> None:
    words = text.split()
    for seed in range(200):
        edited = broken(words, random.Random(seed))
        assert edited != words
        missing, new = Counter(words) - Counter(edited), Counter(edited) - Counter(words)
        assert missing.total() <= 1
        assert new.total() <= missing.total()
        if new:
            ((old,), (now,)) = missing, new
            assert old.rstrip("s") == now.rstrip("s") or any({old.lower(), now.lower()} <= set(kind) for kind in CLOSED)


def test_what_cannot_be_edited_one_way_is_edited_another() -> None:
    assert broken(["x1", "x2"], random.Random(0)) in (["x2", "x1"], ["x1"], ["x2"])
