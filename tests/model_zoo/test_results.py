"""The README's table and ``results.csv`` are made from the cards, and say so of every row."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from model_zoo import results
from model_zoo.cards import Card, find, names
from model_zoo.results import CSV, PUBLISHED, README, csv_text, in_readme, markdown, rows, section


@pytest.fixture
def measured(bundle: Card) -> Card:
    def figures(value: float) -> dict[str, object]:
        return {"accuracy": value, "rows": 277, "split": "validation"}

    part = {"values": [61.0, 60.0, 65.0], "median": 61.0, "least": 60.0, "greatest": 65.0}
    return replace(
        bundle,
        metrics={"fp32": figures(61.014), "ptq": figures(53.0), "qat": figures(60.5)},
        estimators={"mse": {"accuracy": 57.25}, "percentile": {"accuracy": 50.0}},
        sweep={"seeds": [1, 2, 3], "fp32": part, "ptq": part, "qat": part},
    )


def test_readme_and_csv_are_those_of_the_cards() -> None:
    found = rows([find(name) for name in names()])
    assert CSV.read_text(encoding="utf-8") == csv_text(found), "run `python -m model_zoo results`"
    text = README.read_text(encoding="utf-8")
    assert in_readme(text, found) == text, "run `python -m model_zoo results`"
    assert section(found) in text


def test_a_card_becomes_a_row(measured: Card) -> None:
    row = rows([measured])[0]
    assert (row["fp32"], row["ptq_min_max"], row["qat"], row["qat_minus_fp32"]) == ("61.01", "53.00", "60.50", "-0.51")
    assert (row["ptq_best"], row["ptq_best_estimator"], row["rows"]) == ("57.25", "mse", "277")
    assert (row["seeds"], row["qat_median"], row["fp32_greatest"]) == ("1 2 3", "61.00", "65.00")


def test_the_mean_is_over_what_was_measured(measured: Card) -> None:
    other = {what: {"f1": value, "rows": 408, "split": "validation"} for what, value in (("fp32", 80.0), ("ptq", 70.0), ("qat", 81.0))}
    mrpc = replace(measured, name="bert_w8a8_mrpc", task="mrpc", metrics=other, estimators={}, sweep={})
    variant = replace(measured, name="bert_w4a8_rte")
    (mean,) = [row for row in rows([measured, mrpc, variant]) if row["task"] == "mean" and row["source"] == "quantsim"]
    assert (mean["fp32"], mean["qat"], mean["qat_minus_fp32"]) == ("70.50", "70.75", "+0.25")
    assert mean["metric"] == "mean of rte, mrpc"


def test_recipe_only_and_published_rows_say_what_they_are() -> None:
    text = markdown(rows([find("bert_w8a8_qnli")]))
    (ours,) = [line for line in text.splitlines() if "all-MiniLM-L6-v2" in line]
    assert "recipe only" in ours
    assert not any(character.isdigit() for character in ours.partition("measured here")[2])
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for values in csv.DictReader(file):
            assert f"{values['model']}, published by {values['source']}" in text


def test_the_command_changes_nothing_but_the_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: Card) -> None:
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    monkeypatch.setattr(results, "CSV", tmp_path / "results.csv")
    monkeypatch.setattr(results, "names", lambda: ["one"])
    monkeypatch.setattr(results, "find", lambda name: measured)
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    results.write()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n\n|")
    assert text.endswith("\n\n<!-- /results -->\nafter\n")
    assert "61.00 (60.00 to 65.00)" in text
    assert "bert_w8a8_rte" in (tmp_path / "results.csv").read_text()
