"""Cards: what a published checkpoint is, what was measured on it, and the hash of every file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model_zoo.format import CARD, RECIPE_ONLY, check_card
from quantsim import CheckpointError
from quantsim.formats.checkpoint import file_sha256

BUNDLES = Path(__file__).resolve().parent / "bundles"


TRAINED_ON = {"ibert": ("ibert_finetune.py", "--stage integer"), "q8bert": ("q8bert.py", "--do_train")}
"""Schemes whose checkpoints were trained on from a W8A8 card's FP32 model, with what program and flags."""


class NotPublishedError(CheckpointError):
    """There is no checkpoint of this name; the message names the command that trains it."""


@dataclass(frozen=True)
class Card:
    """One config of the zoo, ``model_zoo/bundles/<name>/card.json``.

    Attributes:
        name: ``"bert_w8a8_rte"``.
        task: a name of ``recipes.tasks``.
        where: its files are ``"bundled"`` (beside the card), in ``"hub:owner/name@revision"``, under a base URL, or there are none
            and it is ``"recipe only"``: then it has no files and no figures.
        note: a sentence for the reader; may be empty.
        framework: what wrote it, with its version.
        base_model: ``name``, ``hub_id``, ``source`` (where else it is to be had), the ``sha256`` of its weights file, and the
            ``revision`` on the Hub (empty where it is not known: the hash decides).
        recipe: the recipe's path from the repository's root.
        hyper_parameters: all that the recipe set.
        seed: of the published run.
        quantization: ``QuantConfig.to_dict()``.
        num_labels: classes; 1 is regression.
        metrics: ``fp32``, ``ptq`` and ``qat``, each with the figures in percent, ``rows`` and ``split``; the latter two with the
            ``backend`` where it is not the simulation.
        estimators: PTQ by range estimator, each as in ``metrics``; may be empty.
        sweep: the headline metric over ``seeds`` (of equal ones, the first is the published run's): ``fp32``, ``ptq`` and ``qat``, each
            with its ``values``, ``median``, ``least`` and ``greatest``; may be empty.
        versions: of the libraries.
        date: ISO.
        licence: of the weights.
        data: what it was trained and measured on.
        files: every other file of the bundle: its ``size`` and ``sha256``.
        folder: where it was read from; not part of the file.
    """

    name: str
    task: str
    where: str
    note: str
    framework: str
    base_model: Mapping[str, str]
    recipe: str
    hyper_parameters: Mapping[str, Any]
    seed: int
    quantization: Mapping[str, Any]
    num_labels: int
    metrics: Mapping[str, Mapping[str, Any]]
    estimators: Mapping[str, Mapping[str, Any]]
    sweep: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    licence: str
    data: str
    files: Mapping[str, Mapping[str, Any]]
    folder: Path = field(default=Path(), compare=False)

    @property
    def path(self) -> Path:
        return self.folder / CARD

    @property
    def backend(self) -> str:
        """What the quantized model was measured on (``recipes.backends``)."""
        return str(self.metrics.get("qat", {}).get("backend", "simulated"))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "folder"}


# ---- read ----


def read_card(folder: str | Path) -> Card:
    """The card in a bundle's folder.

    Raises:
        CheckpointError: missing, or as :func:`parse_card`.
    """
    path = Path(folder) / CARD
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; expected a bundle of the zoo") from None
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    return parse_card(text, str(path), path.parent)


def parse_card(text: bytes, path: str, folder: Path) -> Card:
    """A card from its text.

    Args:
        text: JSON.
        path: names it in messages: a file or a URL.
        folder: where its files are, or will be.

    Raises:
        CheckpointError: no JSON, or as ``model_zoo.format.check_card``.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    check_card(path, values, _FIELDS)
    return Card(**values, folder=folder)


_FIELDS = {f.name: str(f.type) for f in fields(Card) if f.name != "folder"}


def names() -> list[str]:
    """Every config that has a card."""
    return sorted(path.parent.name for path in BUNDLES.glob(f"*/{CARD}"))


def published() -> list[str]:
    """The configs whose card names files."""
    return [name for name in names() if read_card(BUNDLES / name).where != RECIPE_ONLY]


def find(name: str) -> Card:
    """A config's card.

    Raises:
        NotPublishedError: there is none of this name; the message names the command that trains it.
        CheckpointError: its card is broken, or is another one's.
    """
    if name not in names():
        raise NotPublishedError(f"{name}: not published yet (published: {', '.join(published()) or 'none'}); {how_to_train(name)}")
    card = read_card(BUNDLES / name)
    if card.name != name:
        raise CheckpointError(f"{card.path}: name is {card.name!r}; expected {name!r}, as its folder")
    return card


def how_to_train(name: str) -> str:
    """The command that trains a config's checkpoint.

    >>> how_to_train("bert_w8a8_qnli")
    'train it with `python recipes/bert_qat.py --recipe recipes/bert_w8a8/qnli.yaml`'
    """
    scheme, _, task = name.rpartition("_")
    if scheme in TRAINED_ON:
        program, flags = TRAINED_ON[scheme]
        recipe = f"recipes/from_card/{name}.yaml"
        return f"train it with `python recipes/{program} --recipe {recipe} --model_name_or_path bert_w8a8_{task} {flags}`"
    return f"train it with `python recipes/bert_qat.py --recipe recipes/{scheme}/{task}.yaml`"


# ---- hashes ----


def check_file(card: Card, name: str) -> None:
    """Compare a file with its card.

    Raises:
        CheckpointError: missing, of another size, or with another sha256.
    """
    path, record = card.folder / name, card.files[name]
    remedy = f"Copy or download it again, or {how_to_train(card.name)}"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing. {remedy}")
    if (size := path.stat().st_size) != record["size"]:
        raise CheckpointError(f"{path}: has {size} bytes; {CARD} expects {record['size']}: it was changed or is not whole. {remedy}")
    if (found := file_sha256(path)) != record["sha256"]:
        raise CheckpointError(f"{path}: sha256 is {found}; {CARD} expects {record['sha256']}: it was changed or damaged. {remedy}")


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
    check_card(str(path), json.loads(json.dumps(values, allow_nan=False)), _FIELDS)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        file = Path(staging) / CARD
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        file.replace(path)
