"""The bundled samples are enough, balanced, distinct, and nobody else's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes.data import SAMPLES
from recipes.tasks import TASKS

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
NAMES = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    """What two copies of a sentence share: its letters and digits."""
    return "".join(character for character in text.casefold() if character.isalnum())


def test_there_is_one_for_every_task() -> None:
    assert set(NAMES) == set(TASKS)
    assert len(rows_of("rte")) >= 200
    assert all(len(rows_of(name)) >= 100 for name in NAMES)


def test_answers_stand_where_they_are_said_to() -> None:
    rows = rows_of("squad")
    assert len({row["context"] for row in rows}) >= 20
    for row in rows:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        assert texts
        assert all(row["context"][start : start + len(text)] == text for text, start in zip(texts, starts, strict=True))


def test_similarities_are_spread_over_the_scale() -> None:
    labels = [row["label"] for row in rows_of("stsb")]
    assert all(isinstance(label, float) and 0 <= label <= 5 for label in labels)
    assert min(Counter(min(int(label), 4) for label in labels).values()) >= len(labels) // 10


@pytest.mark.parametrize("name", NAMES)
def test_columns_and_order(name: str) -> None:
    rows, task = rows_of(name), TASKS[name]
    assert all(set(row) == {"idx", *task.columns, task.label} for row in rows)
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    texts = [row[column] for row in rows for column in task.columns]
    assert all(text == text.strip() and len(text) > 10 for text in texts)


@pytest.mark.parametrize("name", [name for name in NAMES if TASKS[name].kind == "classification"])
def test_labels_are_balanced(name: str) -> None:
    labels = Counter(row["label"] for row in rows_of(name))
    assert set(labels) == set(range(TASKS[name].num_labels))
    assert max(labels.values()) <= 1.1 * min(labels.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_line_twice(name: str) -> None:
    rows, task = rows_of(name), TASKS[name]
    assert max(Counter(tuple(plain(row[column]) for column in task.columns) for row in rows).values()) == 1
    own = task.columns[0] if task.span else task.columns[-1]  # a paragraph serves several questions
    assert max(Counter(plain(row[own]) for row in rows).values()) == 1


def test_a_premise_serves_two_hypotheses_at_most() -> None:
    assert max(Counter(plain(row["sentence1"]) for row in rows_of("rte")).values()) <= 2


def test_rte_is_no_template() -> None:
    """No opening of three words is common, and the label cannot be told from the lengths alone."""
    rows = rows_of("rte")
    openings = Counter(" ".join(row["sentence2"].split()[:3]).lower() for row in rows)
    assert openings.most_common(1)[0][1] <= len(rows) // 20
    lengths = [len(row["sentence2"]) for row in rows]
    middle = sorted(lengths)[len(lengths) // 2]
    guessed = sum((length < middle) == (row["label"] == 0) for length, row in zip(lengths, rows, strict=True)) / len(rows)
    assert 0.3 < guessed < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_no_line_occurs_in_glue(name: str) -> None:
    if not GLUE.is_dir():
        pytest.skip("the GLUE data is not at ../shared/data/glue beside the repository")
    parquet = pytest.importorskip("pyarrow.parquet")
    ours = {plain(row[column]) for row in rows_of(name) for column in TASKS[name].columns}
    files = sorted(GLUE.glob("*/*.parquet"))
    assert files, f"{GLUE} holds no data"
    for file in files:
        table = parquet.read_table(file)
        for column in table.column_names:
            if str(table.schema.field(column).type) in ("string", "large_string"):
                theirs = {plain(text) for text in table[column].to_pylist()}
                assert len(theirs) > 100
                assert not ours & theirs, f"{file.relative_to(GLUE)}, {column}"
