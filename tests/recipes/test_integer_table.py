"""The table of integer-only results is what its CSV says, and a row is what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_zoo.marked import in_marks
from model_zoo.results import csv_text
from recipes import integer_table
from recipes.integer_table import CSV, DOCUMENT, FIELDS, MARKS, OURS, README, row_of, summary, table, with_runs
from recipes.lines import read_lines
from recipes.tasks import RecipeError

RUN = {
    "recipe": {"name": "ibert_mrpc", "task": "mrpc", "seed": 3, "qat": {"lr": 1e-6, "epochs": 2}, "finetune": {"lr": 1e-3, "epochs": 4}},
    "flags": {"fold": None, "max_steps": None},
    "metrics": {"fp32": {"f1": 80.0}, "quantized": {"f1": 70.0}, "integer": {"f1": 79.456, "rows": 9, "equal_to_training_form": 9}},
    "model": "bert, 2 layers, 16 wide",
    "date": "2026-01-02T03:04:05+00:00",
}


def written(folder: Path, **changes: object) -> Path:
    (folder / "results.json").write_text(json.dumps({**RUN, **changes}))
    return folder


def test_the_documents_are_what_the_csv_says() -> None:
    rows = read_lines(CSV, FIELDS)
    for path, made in ((DOCUMENT, table(rows)), (README, summary(rows))):
        text = path.read_text(encoding="utf-8")
        assert in_marks(text, MARKS, made) == text
    assert csv_text(with_runs(rows, []), FIELDS) == CSV.read_text(encoding="utf-8")


def test_our_figures_are_whole_and_beside_the_published_ones() -> None:
    for row in read_lines(CSV, FIELDS):
        assert row["fp32"]
        assert row["after"]
        if row["source"] == OURS:
            assert int(row["rows"]) > 200
        else:
            assert row["source"].startswith("published by")


def test_a_row_is_what_a_run_wrote(tmp_path: Path) -> None:
    row = row_of(written(tmp_path))
    assert (row["fp32"], row["before"], row["after"], row["equal_rows"], row["lr"], row["date"]) == (
        "80.00",
        "70.00",
        "79.46",
        "9",
        "1e-06",
        "2026-01-02",
    )
    assert [r["after"] for r in with_runs(read_lines(CSV, FIELDS), [row]) if r["name"] == "ibert_mrpc"] == ["79.46"]


@pytest.mark.parametrize(
    "changes, message",
    [({"flags": {"max_steps": 3}}, "--max_steps 3 is a trial"), ({"metrics": {"fp32": {"f1": 1.0}}}, "run stage integer")],
    ids=["a trial", "not at its end"],
)
def test_half_a_run_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        row_of(written(tmp_path, **changes))


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = CSV.read_bytes()
    assert integer_table.main([str(tmp_path)]) == 2
    assert "no results of a run" in capsys.readouterr().err
    assert CSV.read_bytes() == before
