"""The program of the post-training table: every method's config, resuming, checkpoints published anew, and the table itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from model_zoo.cards import Card
from quantsim import place
from recipes import post_training
from recipes.post_training import CSV, METHODS, TASKS, best_table, current, main, page, read, table
from tests.tiny import tiny_graph


@pytest.fixture
def rte(bundle: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The program's flags for a tiny checkpoint of RTE and a data set of a few rows."""
    rows = [{"sentence1": f"row {i} says a word", "sentence2": "a word" if i % 3 else "none", "label": i % 2} for i in range(90)]
    data = DatasetDict({"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:12])})
    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    for split, part in data.items():
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    readme = "---\nconfigs:\n- config_name: rte\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: rte/{split}-*\n" for split in ("train", "validation")
    )
    (tmp_path / "glue" / "README.md").write_text(readme + "---\n")
    resolve = post_training.resolve
    monkeypatch.setattr(post_training, "resolve", lambda name, _, task: resolve(name, str(bundle.folder), task))
    monkeypatch.setattr(post_training, "SEARCH_EDGES", 2)
    return ["--dataset", str(tmp_path / "glue"), "--tasks", "rte", "--output", str(tmp_path / "table.csv")]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_another_and_its_rules_match(name: str) -> None:
    config = METHODS[name].config()
    placements = place(tiny_graph(), config)
    others = [(m.config(), m.search) for other, m in METHODS.items() if other != name]
    assert (config, METHODS[name].search) not in others
    changed = {p.op for p in placements if p.spec and p.role == "activation" and (p.spec.groups or p.spec.bits == 16)}
    assert changed == ({"add", "layer_norm", "linear"} if METHODS[name].changes else set())
    scores = [p for p in placements if p.attention == "mask_add"]
    assert scores
    assert all(p.spec and p.spec.axis is None and p.spec.bits == 8 for p in scores)


def test_measures_writes_and_does_not_measure_again(rte: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(rte[-1])
    assert main([*rte, "--methods", "min_max", "groups"]) == 0
    first = read(path)
    assert [row["method"] for row in first] == ["min_max", "groups"]
    assert {row["rows"] for row in first} == {"12"}
    assert all(abs(float(row["fp32"]) - float(row["value"]) - float(row["loss"])) < 1e-3 for row in first)
    assert "6 groups" in path.with_suffix(".md").read_text()

    measured: list[str] = []
    quantized = post_training.quantized
    monkeypatch.setattr(post_training, "quantized", lambda bench, method: measured.append(method.what) or quantized(bench, method))
    assert main([*rte, "--methods", "smooth", "bits_search", "min_max", "groups"]) == 0
    assert measured == [METHODS["smooth"].what, METHODS["bits_search"].what]
    found = {row["method"]: row for row in read(path)}
    assert list(found) == ["min_max", "smooth", "groups", "bits_search"]  # the table's order
    assert found["min_max"] == first[0]
    assert 1 <= int(found["bits_search"]["wide_edges"]) <= 12
    assert int(found["smooth"]["wide_edges"]) == 0


def test_training_rows_are_no_part_of_the_table(rte: list[str]) -> None:
    assert main([*rte, "--methods", "min_max", "--split", "train", "--max_rows", "8"]) == 0
    (row,) = read(Path(rte[-1]))
    assert (row["split"], row["rows"]) == ("train", "8")
    assert "range: min-max" not in Path(rte[-1]).with_suffix(".md").read_text()


def test_a_checkpoint_that_was_published_anew_is_measured_anew(rte: list[str]) -> None:
    path = Path(rte[-1])
    assert main([*rte, "--methods", "min_max"]) == 0
    path.write_text(path.read_text().replace(read(path)[0]["fp32_sha256"], "0" * 64))
    assert main([*rte, "--methods", "min_max"]) == 0
    assert [row["fp32_sha256"] for row in read(path)] != ["0" * 64]


@pytest.mark.parametrize("flags", [["--methods", "smoth"], ["--tasks", "rta"]])
def test_a_name_that_is_none_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert "nearest" in capsys.readouterr().err


def test_a_file_of_other_columns_is_refused(rte: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(rte[-1]).write_text("task,score\nrte,1\n")
    assert main(rte) == 2
    assert "Move it away" in capsys.readouterr().err


def row(**values: Any) -> dict[str, str]:
    return {"split": "validation", "task": "rte", "fp32": "64.0", **values, "loss": str(64.0 - float(values["value"]))}


def test_the_table_marks_the_best_and_takes_means_over_all_tasks_alone() -> None:
    rows = [row(method="min_max", value="50.0"), row(method="smooth", value="63.0"), row(method="min_max", value="60.0", task="mrpc")]
    lines = table(rows).splitlines()
    assert "**63.00**" in next(line for line in lines if "α" in line)
    assert next(line for line in lines if "min-max" in line).rstrip(" |").endswith("9.00")  # (14 + 4) / 2
    assert next(line for line in lines if "α" in line).split("|")[-2].strip() == ""  # not measured on all


def test_the_best_is_the_one_that_loses_least() -> None:
    rows = [row(method="min_max", value="50.0"), row(method="smooth", value="63.0"), row(method="groups", value="63.0")]
    (line,) = best_table(rows).splitlines()[2:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["rte", "14.00", "1.00", "1.00", METHODS["smooth"].what]


# ---- what is published ----


def test_the_page_is_made_of_the_table() -> None:
    assert CSV.with_suffix(".md").read_text() == page(read(CSV))


def test_what_is_published_was_measured_on_whole_splits_of_the_published_checkpoints() -> None:
    rows = read(CSV)
    assert {(r["task"], r["rows"]) for r in rows} == {("rte", "277"), ("mrpc", "408"), ("stsb", "1500"), ("cola", "1043"), ("sst2", "872")}
    assert {(r["seed"], r["split"], r["preset"]) for r in rows} == {("1000", "validation", "aimet")}
    assert current(rows) == rows
    assert len({(r["task"], r["method"]) for r in rows}) == len(rows)
    assert all(abs(float(r["fp32"]) - float(r["value"]) - float(r["loss"])) < 1.5e-4 for r in rows)


@pytest.mark.parametrize("task", TASKS)
def test_the_best_method_leaves_half_the_loss_of_min_max_at_most_or_a_third_of_a_point(task: str) -> None:
    losses = {r["method"]: float(r["loss"]) for r in read(CSV) if r["task"] == task}
    bar = max(0.5 * losses["min_max"], 0.3)
    assert min(losses.values()) <= bar
    assert losses["smooth"] <= bar  # nobody has to know which one is the best


def test_a_trial_is_no_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = CSV.read_bytes()
    assert main(["--tasks", "rte", "--max_rows", "20"]) == 2
    assert "--max_rows 20: a trial, and post_training.csv is of all rows" in capsys.readouterr().err
    assert CSV.read_bytes() == before
