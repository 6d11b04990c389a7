"""A tokenizer of a few words, made here, and rows of text for it."""

from __future__ import annotations

from typing import Any

from transformers import BertTokenizer

from tests.tiny import VOCAB

WORDS = "a the film book song was is and or good bad fine dull long short Paris London lies in".split()
TEXTS = ["the film was good", "a dull and long book", "a song is short", "the book was bad and the film fine"]
LABELS = [1, 0, 1, 0]


def tokenizer() -> BertTokenizer:
    """A WordPiece tokenizer whose ids are below the tiny model's vocabulary."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in WORDS)]
    assert len(words) < VOCAB
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)


def rows() -> list[dict[str, Any]]:
    """Texts as ids, with labels: what a ``Trainer`` takes."""
    return [{**tokenizer()(text), "labels": label} for text, label in zip(TEXTS, LABELS, strict=True)]
