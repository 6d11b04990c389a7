"""Cards, and the program that lists and verifies them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_zoo import cards
from model_zoo.__main__ import main
from model_zoo.cards import Card, NotPublishedError, file_records, find, how_to_train, names, published, read_card, verify, write_card
from model_zoo.format import BUNDLED, MEASURED, RECIPE_ONLY
from model_zoo.publish import VALIDATION_ROWS
from quantsim import CheckpointError, QuantConfig
from recipes.tasks import MODEL_CONFIGS, find_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def zoo(bundle: Card, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo that holds the tiny bundle."""
    monkeypatch.setattr(cards, "BUNDLES", bundle.folder.parent)
    return bundle.folder.parent


def test_what_is_written_is_read(bundle: Card, tmp_path: Path) -> None:
    write_card(bundle, tmp_path)
    assert read_card(tmp_path) == bundle
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["card.json"]


def test_a_card_knows_its_files(bundle: Card) -> None:
    verify(bundle)
    assert bundle.files == file_records(bundle.folder)
    assert set(bundle.files) == {"fp32.safetensors", "w8a8.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("seed"), "no field seed"),
        (lambda v: v.update(sed=1), "unknown field sed"),
        (lambda v: v.update(seed="5"), "seed is '5'; expected int"),
        (lambda v: v.update(seed=True), "seed is True; expected int"),
        (lambda v: v.update(metrics=[]), r"metrics is \[\]; expected dict"),
        (lambda v: v["base_model"].pop("sha256"), "base_model has no sha256"),
        (lambda v: v["metrics"].pop("ptq"), "metrics has no ptq"),
        (lambda v: v["files"].pop("w8a8.safetensors"), r"files has no w8a8\.safetensors"),
        (lambda v: v["files"].update({"../x": v["files"]["config.json"]}), r"files\.\.\./x is .*; expected a plain file name"),
        (lambda v: v["files"]["config.json"].update(sha256="0" * 63), r"files\.config\.json is .*; expected a plain file name with size"),
        (lambda v: v["files"]["config.json"].update(size=0), r"files\.config\.json is"),
        (lambda v: v["files"]["config.json"].update(size=True), r"files\.config\.json is"),
        (lambda v: v["base_model"].update(revision=None), r"base_model\.revision is None; expected text \(empty where"),
        (lambda v: v.update(name="a/b"), "name is 'a/b'; expected letters"),
        (
            lambda v: v.update(where="nowhere"),
            "where is 'nowhere'; expected 'bundled', 'recipe only', 'hub:owner/name@revision' or the URL",
        ),
        (lambda v: v.update(where="hub:name"), "where is 'hub:name'"),
        (lambda v: v.update(where="https://host/a?token=b"), "where is"),
        (lambda v: v.update(where="recipe only"), "where is 'recipe only'; expected no files, metrics, date"),
        (lambda v: v["metrics"].update(qat=1.0), r"metrics\.qat is 1\.0; expected dict"),
        (lambda v: v["estimators"].update(minmax={}), r"estimators\.minmax: no range estimator; they are min_max,"),
        (lambda v: v["estimators"].update(mse=80.0), r"estimators\.mse is 80\.0; expected dict"),
        (lambda v: v["sweep"].update(seeds=[1]), r"sweep: expected an object with seeds, fp32, ptq, qat"),
    ],
)
def test_a_card_that_is_none(bundle: Card, change: Callable[[dict[str, Any]], object], message: str) -> None:
    values = json.loads(bundle.path.read_text())
    change(values)
    bundle.path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"card\.json: {message}"):
        read_card(bundle.folder)


def part(*values: float) -> dict[str, Any]:
    return {"values": list(values), "median": sorted(values)[len(values) // 2], "least": min(values), "greatest": max(values)}


def sweep() -> dict[str, Any]:
    return {"seeds": [5, 6, 7], "fp32": part(50.0, 51.0, 49.0), "ptq": part(50.0, 40.0, 41.0), "qat": part(50.0, 50.5, 51.0)}


@pytest.mark.parametrize("where", ["bundled", "hub:owner/name", "hub:owner/name@v1", "https://host/a/b", "http://127.0.0.1:80"])
def test_a_card_may_say(bundle: Card, where: str) -> None:
    write_card(replace(bundle, where=where, note="x", sweep=sweep(), estimators={"mse": bundle.metrics["ptq"]}), bundle.folder)
    assert read_card(bundle.folder).where == where


def test_recipe_only_is_a_card_too(bundle: Card) -> None:
    write_card(replace(bundle, where=RECIPE_ONLY, files={}, metrics={}, date=""), bundle.folder)
    assert not read_card(bundle.folder).files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("ptq"), r"sweep: expected an object"),
        (lambda v: v.update(seeds=[]), r"sweep\.seeds is \[\]"),
        (lambda v: v.update(seeds=[5, 6.5, 7]), r"sweep\.seeds is \[5, 6\.5, 7\]; expected whole numbers"),
        (lambda v: v.update(seeds=[5, 6]), r"sweep\.fp32\.values is .*; expected a number a seed, 2 of them"),
        (lambda v: v["qat"].update(values=["50", 50.5, 51]), r"sweep\.qat\.values is"),
        (lambda v: v["qat"].update(median=51.0), r"sweep\.qat\.median is 51\.0; its values give 50\.5"),
        (lambda v: v["qat"].update(least=49.0), r"sweep\.qat\.least is 49\.0; its values give 50\.0"),
        (lambda v: v["qat"].pop("greatest"), r"sweep\.qat: expected an object with values, median, least, greatest"),
    ],
)
def test_a_sweep_that_does_not_add_up(change: Callable[[dict[str, Any]], object], message: str, bundle: Card) -> None:
    values = sweep()
    change(values)
    with pytest.raises(CheckpointError, match=rf"card\.json: {message}"):
        write_card(replace(bundle, sweep=values), bundle.folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_no_json(bundle: Card, text: str) -> None:
    bundle.path.write_text(text)
    with pytest.raises(CheckpointError, match=r"card\.json: (not readable as JSON|is a list)"):
        read_card(bundle.folder)


def test_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"card\.json: missing"):
        read_card(tmp_path)


def test_find(zoo: Path) -> None:
    assert published() == ["bert_w8a8_rte"]
    assert find("bert_w8a8_rte").folder == zoo / "bert_w8a8_rte"
    with pytest.raises(NotPublishedError, match=r"not published yet \(published: bert_w8a8_rte\); train it with `.*/cola\.yaml`"):
        find("bert_w8a8_cola")


@pytest.mark.parametrize("name", [*MODEL_CONFIGS, "bert_w8a16_rte", "ibert_mrpc", "q8bert_cola"])
def test_the_command_that_trains_it_names_a_recipe_that_is_there(name: str) -> None:
    (path,) = re.findall(r"--recipe ([^\s`]+)", how_to_train(name))
    assert (ROOT / path).is_file()


def test_a_card_in_another_s_folder(zoo: Path) -> None:
    (zoo / "bert_w8a8_rte").rename(zoo / "bert_w8a8_cola")
    with pytest.raises(CheckpointError, match="name is 'bert_w8a8_rte'; expected 'bert_w8a8_cola'"):
        find("bert_w8a8_cola")


# ---- the program ----


@pytest.fixture
def with_recipe_only(zoo: Path, bundle: Card) -> Card:
    """A second config in the zoo, of which there is only the recipe."""
    card = replace(bundle, name="bert_w8a8_qnli", task="qnli", where=RECIPE_ONLY, note="no data", files={}, metrics={}, date="")
    (zoo / card.name).mkdir()
    write_card(card, zoo / card.name)
    return card


def test_recipe_only_is_a_name_and_not_published(with_recipe_only: Card) -> None:
    assert names() == ["bert_w8a8_qnli", "bert_w8a8_rte"]
    assert published() == ["bert_w8a8_rte"]
    assert find("bert_w8a8_qnli") == with_recipe_only


def test_list(with_recipe_only: Card, bundle: Card, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    header, _, qnli, rte = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, qnli, rte)]
    base, figures = bundle.base_model["name"], ["accuracy 50.00"] * 3
    assert cells[0] == ["name", "task", "base model", "where", "size", "FP32", "PTQ", "QAT"]
    assert cells[1] == ["bert_w8a8_qnli", "qnli", base, "recipe only", "", "", "", ""]
    assert cells[2] == ["bert_w8a8_rte", "rte", base, "bundled", "0.0 MB", *figures]


def test_list_as_json(zoo: Path, bundle: Card, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [bundle.to_dict()]


def test_verify(zoo: Path, with_recipe_only: Card, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bert_w8a8_qnli: not bundled (recipe only)",
        "bert_w8a8_rte: every file is what its card says",
    ]
    (zoo / "bert_w8a8_rte" / "config.json").write_text("{}")
    assert main(["verify"]) == 2
    assert "bert_w8a8_rte: BROKEN" in capsys.readouterr().out
    assert main(["verify", "bert_w8a8_qnli"]) == 0
    assert main(["verify", "bert_w8a8_cola"]) == 2


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "model_zoo", "verify"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what is really in the zoo ----


@pytest.mark.parametrize("name", names())
def test_a_card_of_the_zoo(name: str) -> None:
    card = find(name)
    task = find_task(card.task)
    assert name.endswith(f"_{task.name}")
    assert card.num_labels == task.num_labels
    assert f"--recipe {card.recipe}" in how_to_train(name)
    assert card.where in (BUNDLED, RECIPE_ONLY)
    if card.where == RECIPE_ONLY:
        assert card.note
        return
    verify(card)
    QuantConfig.from_dict(card.quantization)
    for figures in (card.metrics[what] for what in MEASURED):
        assert 0 <= figures[task.metric] <= 100
        assert figures["split"] == task.splits[0]
        assert figures["rows"] == VALIDATION_ROWS[task.name]
