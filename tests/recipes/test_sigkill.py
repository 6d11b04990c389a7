"""The program is killed by SIGKILL, over and over, and ends with the files of a run that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_zoo.cards import read_card, verify
from recipes import bert_qat
from tests.recipes.test_bert_qat import files  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "recipes" / "bert_qat.py"


def flags(recipe: Path, output: Path) -> list[str]:
    """A checkpoint every second step."""
    return ["--recipe", str(recipe), "--output_dir", str(output), "--offline", "--save_steps", "2", "--qat.fused", "false"]


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    """The program in an interpreter of its own."""
    command = [sys.executable, str(PROGRAM), *flags(recipe, output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_when(program: subprocess.Popen[bytes], output: Path, stage: str, delay: float) -> None:
    """SIGKILL, ``delay`` seconds after the first checkpoint of a stage begins to be written."""
    until = time.monotonic() + 300
    while not (list(output.glob(f"stages/{stage}-*/.saving")) or list(output.glob(f"stages/{stage}-*/step-*"))):
        assert program.poll() is None, (program.stderr.read() if program.stderr else b"").decode()
        assert time.monotonic() < until, f"no checkpoint of {stage}"
        time.sleep(0.001)
    time.sleep(delay)
    program.send_signal(signal.SIGKILL)
    program.communicate()


def killed_and_whole(recipe: Path, folder: Path, kills: list[tuple[str, float]]) -> None:
    assert bert_qat.main(flags(recipe, folder / "whole")) == 0
    for stage, delay in kills:
        kill_when(start(recipe, folder / "killed"), folder / "killed", stage, delay)
    assert not (folder / "killed" / "bundle" / "card.json").exists()
    assert bert_qat.main(flags(recipe, folder / "killed")) == 0
    whole, killed = (read_card(folder / name / "bundle") for name in ("whole", "killed"))
    verify(killed)
    assert killed.files == whole.files  # sizes and hashes of weights and ranges
    assert killed.metrics == whole.metrics


def test_killed_in_the_last_stage(files: Path, tmp_path: Path) -> None:  # noqa: F811
    killed_and_whole(files / "rte.yaml", tmp_path, [("qat", 0.0)])


@pytest.mark.slow
def test_killed_at_twenty_moments(files: Path, tmp_path: Path) -> None:  # noqa: F811
    moments = random.Random(0)
    stages = ["mnli"] * 6 + ["finetune"] * 7 + ["qat"] * 7
    killed_and_whole(files / "rte.yaml", tmp_path, [(stage, moments.uniform(0.0, 0.2)) for stage in stages])
