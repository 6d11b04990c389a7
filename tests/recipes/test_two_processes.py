"""Two real processes (gloo) do what one does: ranges, predictions, trained weights, and the program's bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file

from model_zoo.cards import read_card, verify
from recipes import bert_qat
from tests.recipes import two_processes
from tests.recipes.test_bert_qat import files  # noqa: F401

SECONDS = 600  # a hang is a failure; on an idle machine it takes a twentieth of that


def launch(*command: str) -> str:
    """Run a program as two processes on a port that is free; what it printed."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    flags = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with subprocess.Popen(
        [sys.executable, *launcher, *flags, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launched:
        try:
            printed, errors = launched.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, signal.SIGKILL)  # the two processes with it
            raise
    assert launched.returncode == 0, printed + errors
    return printed


EXACT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "mixed_precision": "no"}  # dropout is drawn by each process for its rows


@pytest.fixture(scope="module")
def flags(files: Path) -> list[str]:  # noqa: F811
    """The program's flags for a recipe without dropout."""
    recipe = yaml.safe_load((files / "rte.yaml").read_text())
    recipe["finetune"] |= EXACT
    recipe["qat"] |= {"fused": False}  # compiling takes longer than all else here
    recipe["intermediate"] = [before | EXACT for before in recipe["intermediate"]]
    (files / "exact.yaml").write_text(yaml.safe_dump(recipe))
    return ["--recipe", str(files / "exact.yaml"), "--offline"]


@pytest.fixture(scope="module")
def two(base: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: what each found, and the program's ``output``."""
    folder = tmp_path_factory.mktemp("two")
    printed = launch("-m", "tests.recipes.two_processes", str(base), str(folder), *flags, "--output_dir", str(folder / "output"))
    assert [printed.count(said) for said in ("ptq: accuracy", "qat: accuracy", "bundle: ")] == [1, 1, 1]
    return folder


@pytest.fixture(scope="module")
def both(two: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return [torch.load(two / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    return two_processes.everything(base, tmp_path_factory.mktemp("one"), PartialState(cpu=True))


# ---- calibration ----


@pytest.mark.parametrize("data", ["dealt", "alone"])
def test_ranges_are_those_of_one_process_on_the_same_batches(both: list[dict[str, Any]], one: dict[str, Any], data: str) -> None:
    for found in both:
        assert found[data].keys() == one[data].keys()
        assert not [name for name, end in found[data].items() if not torch.equal(end, one[data][name])]


@pytest.mark.parametrize(
    ("what", "said"),
    [("empty batch", "batch 0 is empty"), ("infinity", "expected ends and width to be finite")],
)
def test_an_error_on_one_process_is_an_error_on_both(both: list[dict[str, Any]], what: str, said: str) -> None:
    assert said in both[1][what]
    assert said in both[0][what]
    assert (what == "infinity") or both[0][what].startswith("process 1 of 2: ")


def test_no_batches_anywhere_is_an_error_on_both(both: list[dict[str, Any]]) -> None:
    assert all("no values were observed" in found["no batches"] for found in both)


def test_errors_leave_the_ranges_as_they_were(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert all(torch.equal(end, found["alone"][name]) for name, end in found["after errors"].items())


# ---- evaluation ----


@pytest.mark.parametrize("rows", ["23 rows", "8 rows", "1 rows", "spans"])
def test_every_row_is_evaluated_once_and_gathered_in_order(both: list[dict[str, Any]], one: dict[str, Any], rows: str) -> None:
    metrics, predictions, logits, count = one[rows]
    for found in both:
        assert found[rows][0] == metrics
        assert found[rows][1] == predictions
        assert (found[rows][2] == logits).all()
        assert found[rows][3] == count


def test_rows_that_one_process_cannot_take_are_an_error_on_both(both: list[dict[str, Any]]) -> None:
    assert "unequal length" in both[1]["ragged"]
    assert "unequal length" in both[0]["ragged"]


# ---- training ----


@pytest.mark.parametrize("what", ["fine-tuned", "fine-tuned, a batch of one row", "fine-tuned, in parts", "qat"])
def test_training_gives_the_weights_of_one_process_with_the_whole_batch(both: list[dict[str, Any]], one: dict[str, Any], what: str) -> None:
    for found in both:
        assert found[what].keys() == one[what].keys()
        for name, weight in found[what].items():
            torch.testing.assert_close(weight, one[what][name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


# ---- the program ----


@pytest.fixture(scope="module")
def output(two: Path) -> Path:
    """What the program wrote in two processes."""
    return two / "output"


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote."""
    folder = tmp_path_factory.mktemp("program") / "one"
    assert bert_qat.main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def test_two_processes_write_one_bundle_and_its_results_once(output: Path) -> None:
    card = read_card(output / "bundle")
    verify(card)
    assert {name: values["rows"] for name, values in card.metrics.items()} == {"fp32": 11, "ptq": 11, "qat": 11}
    assert len((output / "trials.jsonl").read_text().splitlines()) == 1
    for stage in (output / "stages").iterdir():
        assert len(list(stage.glob("step-*"))) == 1
        epochs = [json.loads(line)["epoch"] for line in (stage / "log.jsonl").read_text().splitlines()]
        assert epochs == sorted(set(epochs))


def test_one_process_goes_on_from_what_two_did_and_finds_the_same(output: Path, flags: list[str], tmp_path: Path) -> None:
    """Nothing is trained again, so calibration and evaluation alone are compared: to the bit."""
    again = tmp_path / "again"
    shutil.copytree(output, again)
    assert bert_qat.main([*flags, "--output_dir", str(again), "--stage", "qat"]) == 0
    assert len(list((again / "stages").iterdir())) == len(list((output / "stages").iterdir()))
    assert read_card(again / "bundle").files == read_card(output / "bundle").files
    assert read_card(again / "bundle").metrics == read_card(output / "bundle").metrics


@pytest.mark.parametrize("file", ["mnli-*/step-*/model.safetensors", "finetune-*/step-*/model.safetensors", "qat-*/teacher.safetensors"])
def test_the_program_trains_the_weights_that_one_process_does(output: Path, alone: Path, file: str) -> None:
    """In float32 up to here; in QAT a rounding more or less is a step of a grid, so that is compared in float64 above."""
    one, two = (load_file(next((folder / "stages").glob(file))) for folder in (alone, output))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        if not name.endswith("key.bias"):  # its gradient is 0, and Adam makes steps of the rounding
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
