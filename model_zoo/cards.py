"""Cards: what a published checkpoint is, what was measured on it, and the hash of every file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantsim import CheckpointError
from quantsim.formats.checkpoint import file_sha256

BUNDLES = Path(__file__).resolve().parent / "bundles"
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CARD, FP32, W8A8, CONFIG = "card.json", "fp32.safetensors", "w8a8.safetensors", "config.json"
FILES = (FP32, W8A8, CONFIG)

_NESTED = {"base_model": ("name", "hub_id", "source", "sha256"), "metrics": ("fp32", "ptq", "qat")}


class NotPublishedError(CheckpointError):
    """No checkpoint of this name is bundled; the message names the command that trains it."""


@dataclass(frozen=True)
class Card:
    """One published checkpoint, ``model_zoo/bundles/<name>/card.json``.

    Attributes:
        name: ``"bert_w8a8_rte"``.
        task: a name of ``recipes.tasks``.
        framework: what wrote it, with its version.
        base_model: ``name``, ``hub_id``, ``source`` (where else it is to be had) and the ``sha256`` of its weights file.
        recipe: the recipe's path from the repository's root.
        hyper_parameters: all that the recipe set.
        seed: of the published run.
        quantization: ``QuantConfig.to_dict()``.
        num_labels: classes; 1 is regression.
        metrics: ``fp32``, ``ptq`` and ``qat``, each with the figures in percent, ``rows`` and ``split``.
        versions: of the libraries.
        date: ISO.
        licence: of the weights.
        data: what it was trained and measured on.
        files: every other file of the bundle: its ``size`` and ``sha256``.
        folder: where it was read from; not part of the file.
    """

    name: str
    task: str
    framework: str
    base_model: Mapping[str, str]
    recipe: str
    hyper_parameters: Mapping[str, Any]
    seed: int
    quantization: Mapping[str, Any]
    num_labels: int
    metrics: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    date: str
    licence: str
    data: str
    files: Mapping[str, Mapping[str, Any]]
    folder: Path = field(default=Path(), compare=False)

    @property
    def path(self) -> Path:
        return self.folder / CARD

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "folder"}


# ---- read ----


def read_card(folder: str | Path) -> Card:
    """The card in a bundle's folder.

    Raises:
        CheckpointError: missing, no JSON, a field that is missing, unknown or of another type, a file name that is a path.
    """
    folder = Path(folder)
    path = folder / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; expected a bundle of the zoo") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    _check(path, values)
    return Card(**values, folder=folder)


def _check(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is a {type(values).__name__}; expected an object")
    known = {f.name: f.type for f in fields(Card) if f.name != "folder"}
    if missing := [name for name in known if name not in values]:
        raise CheckpointError(f"{path}: no field {', '.join(missing)}")
    if unknown := [name for name in values if name not in known]:
        raise CheckpointError(f"{path}: unknown field {', '.join(unknown)}; the fields are {', '.join(known)}")
    for name, kind in known.items():
        expected = dict if str(kind).startswith("Mapping") else {"str": str, "int": int}[str(kind)]
        if not isinstance(values[name], expected) or isinstance(values[name], bool):
            raise CheckpointError(f"{path}: {name} is {values[name]!r}; expected {expected.__name__}")
    for name, parts in _NESTED.items():
        if missing := [part for part in parts if part not in values[name]]:
            raise CheckpointError(f"{path}: {name} has no {', '.join(missing)}")
    for name, record in values["files"].items():
        if Path(name).name != name or not isinstance(record, dict) or set(record) != {"size", "sha256"}:
            raise CheckpointError(f"{path}: files.{name} is {record!r}; expected a plain file name with size and sha256")
    if missing := [name for name in FILES if name not in values["files"]]:
        raise CheckpointError(f"{path}: files has no {', '.join(missing)}")


def published() -> list[str]:
    """The names of the bundled checkpoints."""
    return sorted(path.parent.name for path in BUNDLES.glob(f"*/{CARD}"))


def find(name: str) -> Card:
    """A bundled checkpoint's card.

    Raises:
        NotPublishedError: there is none of this name; the message names the command that trains it.
        CheckpointError: its card is broken, or is another one's.
    """
    if name not in published():
        raise NotPublishedError(f"{name}: not published yet (published: {', '.join(published()) or 'none'}); {how_to_train(name)}")
    card = read_card(BUNDLES / name)
    if card.name != name:
        raise CheckpointError(f"{card.path}: name is {card.name!r}; expected {name!r}, as its folder")
    return card


def how_to_train(name: str) -> str:
    """The command that trains a checkpoint: by its own recipe, or while that is not written by RTE's with another task."""
    task = name.removeprefix("bert_w8a8_")
    program, folder = "python recipes/bert_qat.py --recipe recipes/bert_w8a8", RECIPES / "bert_w8a8"
    if (folder / f"{task}.yaml").is_file():
        return f"train it with `{program}/{task}.yaml`"
    if task == "squad":
        return "it cannot be trained here yet: bert_qat.py trains classifiers and regressions, and SQuAD's answers are spans"
    return f"its recipe is not written yet; RTE's trains it: `{program}/rte.yaml --name {name} --task {task} --intermediate null`"


# ---- hashes ----


def check_file(card: Card, name: str) -> None:
    """Compare a file with its card.

    Raises:
        CheckpointError: missing, of another size, or with another sha256.
    """
    path, record = card.folder / name, card.files[name]
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; restore it or train it again (`python recipes/bert_qat.py --recipe {card.recipe}`)")
    if (size := path.stat().st_size) != record["size"]:
        raise CheckpointError(f"{path}: has {size} bytes; {CARD} expects {record['size']}. The file was changed or is not whole")
    if (found := file_sha256(path)) != record["sha256"]:
        raise CheckpointError(f"{path}: sha256 is {found}; {CARD} expects {record['sha256']}. The file was changed or damaged")


def verify(card: Card) -> None:
    """Compare every file with the card, and find no file that it does not list. Raises ``CheckpointError``."""
    for name in card.files:
        check_file(card, name)
    if extra := sorted({path.name for path in card.folder.iterdir()} - set(card.files) - {CARD}):
        raise CheckpointError(f"{card.folder}: holds {', '.join(extra)}, which {CARD} does not list")


def file_records(folder: str | Path) -> dict[str, dict[str, Any]]:
    """``Card.files`` for a folder: size and sha256 of every file but the card itself."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.name != CARD)
    return {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def write_card(card: Card, folder: str | Path) -> None:
    """Write ``card.json``, whole or not at all, and only if :func:`read_card` would take it."""
    values = card.to_dict()
    path = Path(folder) / CARD
    _check(path, json.loads(json.dumps(values, allow_nan=False)))
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        file = Path(staging) / CARD
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        file.replace(path)
