"""`quantsim report`: a page and its results; a model that is not quantized is calibrated first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model_zoo.cards import Card
from quantsim import QuantSim, ReportError
from tests.cli.conftest import Run, names_in
from tests.report.test_report import data_in

pytest.importorskip("plotly")


def test_a_checkpoint(checkpoint: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "page.html"
    command = ["report", checkpoint, "--data", texts, "--max-length", 16, "--output", page]
    found = run(*command, "--json").json
    assert found["written"] == [str(page), str(tmp_path / "page.json")]
    assert names_in(tmp_path) == {"page.html", "page.json"}
    text, results = page.read_text(), (tmp_path / "page.json").read_text()
    json.loads(results)
    sim = QuantSim.from_pretrained(checkpoint)
    assert all(name in text for name in sim.quantizers)
    assert run(*command).code == 0  # its own page is gone on with
    assert (tmp_path / "page.json").read_text() == results


def test_a_model_is_calibrated_first_and_shown_beside_another(model: Path, checkpoint: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    flags = ["--data", texts, "--rows", 4, "--max-length", 16, "--no-sensitivity", "--output", tmp_path / "page.html"]
    ran = run("report", model, *flags, "--before", checkpoint)
    assert ran.code == 0, ran.err
    assert names_in(tmp_path) == {"page.html", "page.json", "page.before.json"}


def test_before_and_after_training_side_by_side(bundle: Card, texts: Path, tmp_path: Path, run: Run) -> None:
    """The floating-point model of a card, calibrated, beside the simulation that the card holds."""
    flags = ["--data", texts, "--max-length", 16]
    assert run("quantize", bundle.folder, *flags, "--output", tmp_path / "ptq").code == 0
    page = tmp_path / "page.html"
    ran = run("report", bundle.folder, *flags, "--rows", 4, "--no-sensitivity", "--before", tmp_path / "ptq", "--output", page)
    assert ran.code == 0, ran.err
    found = data_in(page)
    assert [subject["model"] for subject in found["subjects"]] == ["BertForSequenceClassification"] * 2
    after, before = ([edge["sides"][i] for edge in found["edges"]] for i in (0, 1))
    assert [side is None for side in after] == [side is None for side in before]
    assert sum(a != b for a, b in zip(after, before, strict=True)) > len(after) / 4
    command = ["report", bundle.folder, *flags, "--rows", 4, "--no-sensitivity", "--before", tmp_path / "page.before.json"]
    assert run(*command, "--output", tmp_path / "again.html").code == 0
    assert [edge["sides"][1] for edge in data_in(tmp_path / "again.html")["edges"]] == before


def test_what_it_refuses(checkpoint: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    command = ["report", checkpoint, "--data", texts, "--output"]
    (tmp_path / "mine.html").write_text("precious")
    assert "exists already" in run(*command, tmp_path / "mine.html").refused()
    assert "expected the name of the page" in run(*command, tmp_path / "page.json", "--max-length", 16).refused()
    assert "no data" in run("report", checkpoint, "--output", tmp_path / "page.html").refused()
    assert names_in(tmp_path) == {"mine.html"}


def test_a_file_of_the_users_is_not_taken_for_results(checkpoint: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    """The page's results have its name, and the user's rows may have it too."""
    precious = tmp_path / "rows.json"
    precious.write_text('{"text": "precious"}')
    command = ["report", checkpoint, "--data", texts, "--max-length", 16, "--output", tmp_path / "rows.html"]
    for flags in ([], ["--overwrite"]):
        assert f"would replace {precious}, which is no analysis" in run(*command, *flags).refused()
    with pytest.raises(ReportError, match=r"rows\.json: is no analysis, and would be replaced by one"):
        QuantSim.from_pretrained(checkpoint).report([{"input_ids": torch.ones(2, 5, dtype=torch.long)}], tmp_path / "rows.html")
    assert precious.read_text() == '{"text": "precious"}'
