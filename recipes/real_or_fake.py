"""Sentences and broken copies of them: a task that teaches a sentence encoder syntax, made from the texts of any other task.

Warstadt, Singh and Bowman (2019, "Neural Network Acceptability Judgments") train their encoders so before CoLA; their fakes are
written by a language model or by shuffling, ours by one small edit each, so that a pair differs in little but grammar.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from datasets import Dataset

from recipes.tasks import Task

CLOSED = (
    ("is", "are", "was", "were", "be", "been", "being", "am"),
    ("has", "have", "had", "having"),
    ("do", "does", "did", "done", "doing"),
    ("will", "would", "can", "could", "shall", "should", "may", "might", "must"),
    ("he", "him", "his", "himself"),
    ("she", "her", "hers", "herself"),
    ("they", "them", "their", "themselves"),
    ("we", "us", "our", "ourselves"),
    ("i", "me", "my", "myself"),
    ("in", "on", "at", "of", "to", "for", "with", "from", "by", "about", "into"),
    ("a", "the", "this", "these", "that", "those"),
    ("who", "which", "what", "whom", "whose", "where"),
)
SHORTEST, LONGEST = 4, 25  # words

Words = list[str]


def real_or_fake(rows: Dataset, task: Task, seed: int) -> Dataset:
    """Each text of ``rows`` as it is (``label`` 1) and with one edit (``label`` 0): the columns of CoLA.

    Texts of fewer than 4 or more than 25 words are left out, and texts that came before.
    """
    chance = random.Random(seed)
    found: dict[str, str] = {}
    for row in rows.select_columns(list(task.columns)):
        for name in task.columns:
            words = row[name].split()
            if SHORTEST <= len(words) <= LONGEST and row[name] not in found:
                found[row[name]] = " ".join(broken(words, chance))
    pairs = [(text, label) for real, fake in found.items() for text, label in ((real, 1), (fake, 0))]
    return Dataset.from_dict({"sentence": [text for text, _ in pairs], "label": [label for _, label in pairs]})


def broken(words: Words, chance: random.Random) -> Words:
    """One edit that changes something; which one is drawn.

    >>> broken("the cats were asleep".split(), random.Random(1)) != "the cats were asleep".split()
    True
    """
    edits: list[Callable[[Words, random.Random], Words]] = [_swap, _move, _drop, _number, _number, _exchange, _exchange]
    chance.shuffle(edits)
    return next(edited for edit in edits if (edited := edit(words, chance)) != words)


def _swap(words: Words, chance: random.Random) -> Words:
    """Two neighbours change places."""
    i = chance.randrange(len(words) - 1)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def _move(words: Words, chance: random.Random) -> Words:
    """A word goes elsewhere."""
    rest = list(words)
    word = rest.pop(chance.randrange(len(rest)))
    rest.insert(chance.randrange(len(rest) + 1), word)
    return rest


def _drop(words: Words, chance: random.Random) -> Words:
    """A word is missing."""
    i = chance.randrange(len(words))
    return words[:i] + words[i + 1 :]


def _number(words: Words, chance: random.Random) -> Words:
    """A word of some length gains or loses its final s: agreement, plural, possessive."""
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and not word.endswith("ss")]
    if not places:
        return words
    i = chance.choice(places)
    return [*words[:i], words[i][:-1] if words[i].endswith("s") else words[i] + "s", *words[i + 1 :]]


def _exchange(words: Words, chance: random.Random) -> Words:
    """A function word becomes another of its kind."""
    kinds = {word: kind for kind in CLOSED for word in kind}
    places = [i for i, word in enumerate(words) if word.lower() in kinds]
    if not places:
        return words
    i = chance.choice(places)
    other = chance.choice([word for word in kinds[words[i].lower()] if word != words[i].lower()])
    return [*words[:i], other.capitalize() if words[i][0].isupper() else other, *words[i + 1 :]]
