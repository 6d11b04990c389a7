"""``python -m model_zoo publish``: a whole run becomes a card and a bundle, a trial does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_zoo import publish as publishing
from model_zoo.__main__ import main
from model_zoo.cards import Card, read_card, verify, write_card
from model_zoo.format import W8A8
from model_zoo.publish import publish, publish_run, revision_of
from quantsim import CheckpointError
from recipes.tasks import TASKS

NAME = "bert_w8a8_rte"
PART = {"values": [49.0, 50.0, 52.0], "median": 50.0, "least": 49.0, "greatest": 52.0}
SWEEP: dict[str, Any] = {"seeds": [4, 5, 6], "fp32": PART, "ptq": PART, "qat": PART}


@pytest.fixture
def run(bundle: Card, tmp_path: Path) -> Path:
    """What ``bert_qat.py`` leaves: a bundle, ``results.json``, and stages that are nobody's business."""
    folder = tmp_path / "run"
    shutil.copytree(bundle.folder, folder / "bundle")
    (folder / "stages").mkdir()
    write_results(folder)
    return folder


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundles"
    monkeypatch.setattr("model_zoo.cards.BUNDLES", folder)
    monkeypatch.setattr(publish_run, "__defaults__", ("", folder))
    return folder


def write_results(folder: Path, **flags: object) -> None:
    unset = dict.fromkeys(("fold", "max_steps", "max_train_rows", "max_eval_rows"))
    (folder / "results.json").write_text(json.dumps({"metrics": {}, "flags": unset | {"folds": 5} | flags}))


def change(run: Path, **fields: Any) -> None:
    write_card(replace(read_card(run / "bundle"), **fields), run / "bundle")


def test_a_run_becomes_a_bundle(run: Path, zoo: Path, bundle: Card, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "sweep.json").write_text(json.dumps(SWEEP))
    assert main(["publish", str(run), "--note", "the median of three seeds"]) == 0
    card = read_card(zoo / NAME)
    verify(card)
    assert card == replace(bundle, note="the median of three seeds", sweep=SWEEP)
    assert sorted(path.name for path in (zoo / NAME).iterdir()) == sorted(["card.json", *bundle.files])
    assert [path.name for path in zoo.iterdir()] == [NAME]
    out = capsys.readouterr().out
    assert "accuracy 50.00" in out
    assert str(zoo / NAME) in out


def test_a_bundle_alone_keeps_what_its_card_says(run: Path, zoo: Path) -> None:
    change(run, sweep=SWEEP, note="as before", where="hub:owner/name")
    card = publish_run(run / "bundle")
    assert (card.sweep, card.note, card.where) == (SWEEP, "as before", "bundled")


def test_it_takes_the_place_of_a_card_without_files(run: Path, zoo: Path, bundle: Card) -> None:
    (zoo / NAME).mkdir(parents=True)
    write_card(replace(bundle, where="recipe only", files={}, metrics={}, date="", note="no data"), zoo / NAME)
    assert publish_run(run) == bundle


@pytest.mark.parametrize(("flag", "value"), [("fold", 0), ("max_steps", 3), ("max_train_rows", 9), ("max_eval_rows", 277)])
def test_a_trial(run: Path, zoo: Path, flag: str, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(run, **{flag: value})
    assert main(["publish", str(run)]) == 2
    assert f"results.json: a run with --{flag} {value} is a trial" in capsys.readouterr().err
    assert not zoo.exists()


def test_rows_that_are_not_the_whole_split(run: Path, zoo: Path) -> None:
    metrics = read_card(run / "bundle").metrics
    change(run, metrics={**metrics, "qat": {**metrics["qat"], "rows": 276}})
    with pytest.raises(CheckpointError, match=r"metrics\.qat\.rows is 276; the official validation split of rte has 277"):
        publish_run(run)


def test_every_task_has_an_official_number_of_rows() -> None:
    assert set(publishing.VALIDATION_ROWS) == set(TASKS)


def test_a_bundle_that_is_too_large(run: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(record["size"] for record in read_card(run / "bundle").files.values())
    monkeypatch.setattr(publishing, "LARGEST", size)
    publish_run(run)
    monkeypatch.setattr(publishing, "LARGEST", size - 1)
    with pytest.raises(CheckpointError, match=rf"has {size} bytes; a bundle may have {size - 1}"):
        publish_run(run)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{", "not readable as JSON"),
        ("{}", r"seeds is None; expected the published run's among them, 5"),
        (json.dumps(SWEEP | {"seeds": [1, 2, 3]}), r"seeds is \[1, 2, 3\]; expected the published run's among them, 5"),
        (json.dumps(SWEEP | {"seeds": [5, 4, 6]}), r"fp32\.values has 49\.0 for seed 5; .*card\.json has accuracy 50\.0"),
        (json.dumps(SWEEP | {"qat": PART | {"median": 51.0}}), r"qat\.median is 51\.0; its values give 50\.0"),
    ],
    ids=["json", "empty", "seed", "value", "median"],
)
def test_a_sweep_that_is_not_this_run_s(run: Path, zoo: Path, sweep: str, message: str) -> None:
    (run / "sweep.json").write_text(sweep)
    with pytest.raises(CheckpointError, match=rf"sweep\.json.*{message}"):
        publish_run(run)
    assert not zoo.exists()


def test_no_run(tmp_path: Path, zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(tmp_path / "nowhere")]) == 2
    assert "card.json: missing" in capsys.readouterr().err


def test_a_damaged_bundle_leaves_the_one_before(run: Path, zoo: Path, bundle: Card) -> None:
    publish_run(run)
    (run / "bundle" / W8A8).write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="w8a8"):
        publish(read_card(run / "bundle"), zoo)
    verify(read_card(zoo / NAME))


def test_a_base_that_came_from_no_hub_has_no_revision(base: Path) -> None:
    assert revision_of(str(base)) == ""
