"""The benchmark's command runs, on one small shape."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.engines.inputs import operations


def test_the_operations_of_a_layer_are_those_of_its_linears() -> None:
    whole, head = operations("MiniLM", 8, 128), 2 * 8 * (384 * 384 + 2 * 384)
    assert whole - head == 2 * 8 * 128 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.engines.__main__ import main

    flags = ["--models", "MiniLM", "--shapes", "1x32", "--turns", "1", "--engines", "ours deploy lowered", "--output", str(tmp_path)]
    assert main(flags) == 0
    rows = list(csv.DictReader((tmp_path / "engines.csv").open()))
    assert [row["engine"] for row in rows] == ["torch FP32", "ours deploy lowered"]
    assert all(float(row["milliseconds"]) > 0 for row in rows)
    assert "| ours deploy lowered |" in (tmp_path / "engines.md").read_text()
    assert (tmp_path / "engines.png").stat().st_size > 5000
    assert main([*flags[:3], "2x16", *flags[4:]]) == 0
    rows = list(csv.DictReader((tmp_path / "engines.csv").open()))
    assert [(row["rows"], row["tokens"]) for row in rows] == [("2", "16")] * 2 + [("1", "32")] * 2  # the other shape stays


@pytest.mark.slow
def test_the_integer_training_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import integer_training

    output = tmp_path / "figures.json"
    sizes = ["--rounds", "1", "--rows", "2", "--length", "8", "--threads", "1", "--bits", "8", "16"]
    flags = [*sizes, "--no-fused", "--models", "MiniLM shape (6x384)"]
    monkeypatch.setattr("sys.argv", ["integer_training.py", *flags, "--output", str(output)])
    integer_training.main()
    found = json.loads(output.read_text())["results"]
    assert [row["step"] for row in found] == ["FP32", "bf16 autocast", "integers, 8 bits", "integers, 16 bits"]
    assert all(row["ms"] > 0 for row in found)


def test_integer_only_runs_every_contender() -> None:
    from benchmarks.integer_only import FLOOR, FP32, contenders, interleaved, rows_of

    times = interleaved(contenders("tiny", 2, 8, compiles=False), rounds=2)
    assert list(times) == [FP32, "lower(), preset aimet", "integer only", "transformers ibert, quant_mode", FLOOR]
    assert rows_of(times)[0]["times as fast as FP32"] == 1.0


def test_the_readme_s_tables_of_integers_are_the_measured_ones() -> None:
    from benchmarks.tables import README, in_readme

    text = README.read_text(encoding="utf-8")
    assert in_readme(text) == text
