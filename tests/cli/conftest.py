"""Tiny models with a tokenizer in folders, some rows, and the program run in this process."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import BertForSequenceClassification

from quantsim.cli.main import main
from tests.model_zoo.conftest import base, bundle, whole_bundle  # noqa: F401
from tests.recipes.conftest import no_hub  # noqa: F401
from tests.tiny import tiny_bert

TEXTS = ["the dog ran far.", "it rained, and rained", "a cat", "who won 5 of 7?", "she slept", "may was dry"]


@dataclass(frozen=True)
class Ran:
    """What a run of the program left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    def refused(self) -> str:
        """The line that says why: nothing else may be said, and no traceback."""
        assert self.code == 2, (self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def save_model(folder: Path, tokenizer: Path, head: type[nn.Module] = BertForSequenceClassification, **changes: Any) -> Path:
    """A tiny model in a folder, with a tokenizer from another."""
    shutil.copytree(tokenizer, folder)
    tiny_bert(head, num_hidden_layers=1, **changes).save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:  # noqa: F811
    return save_model(tmp_path_factory.mktemp("models") / "classifier", base)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> Path:
    """What `quantsim quantize` writes; for reading alone."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert-w8a8"
    assert main(["quantize", str(model), "--data", str(texts), "--max-length", "16", "--output", str(folder), "--json"]) == 0
    return folder
