"""The study runs its cells once, and says what its lines say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model_zoo.marked import in_marks
from recipes import integer_study, integer_vit
from recipes.integer_cells import FIELDS, GLUE, VARIANTS, VIT, WIDTHS, config_flags
from recipes.integer_finetune import parse
from recipes.integer_study import PUBLISHED, ablations, main, page, read, table, tables, write
from tests.recipes.test_integer_finetune import files  # noqa: F401


def line(task: str, variant: str, seed: int, value: float) -> dict[str, str]:
    given = {"task": task, "variant": variant, "seed": str(seed), "metric": "accuracy", "value": f"{value:.4f}"}
    return dict.fromkeys(FIELDS, "") | given


@pytest.fixture
def flags(files: Path, base: Path) -> list[str]:  # noqa: F811
    """What makes of RTE's recipe one of a tiny base and a few rows."""
    changes = {
        "base_model": base,
        "dataset": files / "glue",
        "max_length": 24,
        "finetune.batch": 8,
        "finetune.epochs": 2,
        "finetune.lr": 1e-2,
    }
    return ["--offline", "--no-fused", "--intermediate", "null", *(x for name, value in changes.items() for x in (f"--{name}", str(value)))]


def test_cells_are_measured_once(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--tasks", "rte", "--seeds", "1", "--csv", str(tmp_path / "study.csv"), "--runs", str(tmp_path / "runs"), "--no-plot", *flags]
    assert main([*given, "--variants", "float", "12", "8_float_norm"]) == 0
    rows = read(tmp_path / "study.csv")
    assert [(row["variant"], row["gradient_bits"]) for row in rows] == [("float", ""), ("12", "12"), ("8_float_norm", "8")]
    assert (rows[2]["ops"], rows[2]["exponents"]) == ("linear convolution embedding", "row")
    assert all((row["rows"], row["train_rows"], row["epochs"]) == ("9", "all", "2") for row in rows)
    text = (tmp_path / "study.md").read_text()
    assert text == page(rows, "study.png")
    assert "LayerNorm in floating point" in text

    def not_again(_: object) -> int:
        raise AssertionError

    monkeypatch.setattr("recipes.integer_finetune.main", not_again)
    assert main([*given, "--variants", "8_float_norm", "float"]) == 0
    assert read(tmp_path / "study.csv") == rows


def test_a_run_that_fails_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "study.csv", [line("rte", "float", 1, 60)])
    monkeypatch.setattr("recipes.integer_finetune.main", lambda _: 2)
    given = ["--tasks", "rte", "--seeds", "1", "--csv", str(tmp_path / "study.csv"), "--runs", str(tmp_path / "runs")]
    assert main([*given, "--variants", "float", "8"]) == 2
    assert "rte, 8, seed 1: the run failed" in capsys.readouterr().err
    assert len(read(tmp_path / "study.csv")) == 1


@pytest.mark.parametrize(
    "given, message",
    [(["--tasks", "rtee"], "--tasks rtee: expected of .*nearest: rte"), (["--variants", "9"], "--variants 9: expected of float, 16")],
)
def test_an_unknown_cell_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_table_compares_the_same_seeds() -> None:
    rows = [line("rte", "float", 1, 60), line("rte", "float", 2, 64), line("rte", "8", 2, 63), line("mrpc", "float", 1, 80)]
    lines = table(rows, WIDTHS, GLUE, PUBLISHED).splitlines()
    assert "62.00 ± 2.83 (2)" in lines[2]
    assert "63.00 (1)" in lines[3]
    assert "-1.00 (1 of 2 tasks)" in lines[3]
    assert lines[3].rstrip(" |").endswith("-1.7")


def test_a_line_without_fp32_beside_it_is_compared_with_nothing() -> None:
    """As the one that the README's command measures again."""
    (line_of_8,) = [x for x in page([line("cola", "8", 1, 30)], "plot.png").splitlines() if "30.00 (1)" in x]
    assert [x.strip() for x in line_of_8.strip("|").split("|")] == ["8 bits", "30.00 (1)", "", "-1.7"]


def test_what_else_was_varied_is_compared_on_its_own_tasks() -> None:
    rows = [line(task, variant, 1, 60) for task in ("rte", "cola") for variant in ("float", "8")] + [line("cola", "8_matmul", 1, 59)]
    head, _, *lines = ablations(rows).splitlines()
    assert [x.strip() for x in head.strip("|").split("|")] == ["", "cola (matthews)", "mean − FP32"]
    assert [x.strip("| ").split("|")[-1].strip() for x in lines] == ["60.00 (1)", "+0.00", "-1.00"]
    assert ablations([row for row in rows if row["variant"] != "8_matmul"]) == ""


@pytest.mark.parametrize("task", VIT)
def test_the_vision_transformer_is_a_task_too(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = integer_vit.main
    monkeypatch.setattr(integer_vit, "main", lambda given: program([*given, "--epochs", "0.1", "--no-fused"]))
    given = ["--tasks", task, "--seeds", "1", "--csv", str(tmp_path / "study.csv"), "--runs", str(tmp_path / "runs"), "--no-plot"]
    assert main([*given, "--variants", "float", "8"]) == 0
    rows = read(tmp_path / "study.csv")
    assert [(row["task"], row["variant"], row["metric"], row["rows"]) for row in rows] == [
        (task, "float", "accuracy", "360"),
        (task, "8", "accuracy", "360"),
    ]
    assert f"{task} (accuracy)" in (tmp_path / "study.md").read_text()


def test_flags_that_no_task_takes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tasks", "digits", "--datset", "here"]) == 2
    assert "--datset: unknown here" in capsys.readouterr().err


def test_every_variant_is_what_its_flags_say() -> None:
    for variant in VARIANTS.values():
        _, config, _ = parse(["--task", "rte", *config_flags(variant.config)])
        assert config == variant.config


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    integer_study.plot([line("rte", "float", 1, 60), line("rte", "8", 1, 59)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not integer_study.CSV.is_file(), reason="no study was run")
def test_the_page_and_the_readme_say_what_the_lines_say() -> None:
    rows, readme = read(integer_study.CSV), integer_study.README.read_text()
    assert integer_study.CSV.with_suffix(".md").read_text() == page(rows, "integer_training.png")
    for marks, made in tables(rows).items():
        assert in_marks(readme, marks, made) == readme


def test_a_trial_is_no_line_of_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    for name, *flags in (("max_steps", "--max_steps", "3"), ("fold", "--fold=0"), ("max_train_rows", "--max_train_samples", "9")):
        assert main(["--tasks", "rte", *flags]) == 2
        assert f"--{name}: a trial, and integer_training.csv holds whole runs" in capsys.readouterr().err
