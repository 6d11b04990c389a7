"""What ``--model_config`` and ``--checkpoint`` name: two models, FP32 and W8A8, and the tokenizer they were trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from model_zoo.bundle import load_float, load_simulation, load_trainable
from model_zoo.cards import Card, find, names, published, read_card, verify
from model_zoo.fetch import fetch_card, fetch_files, place_of
from model_zoo.format import BUNDLED, CARD
from quantsim import CheckpointError, QuantSim
from quantsim.config import near
from quantsim.formats.checkpoint import MODEL_CONFIG, WEIGHTS, file_sha256, is_checkpoint, read_checkpoint
from recipes.base_model import base_model_folder
from recipes.hub import hub_reachable
from recipes.tasks import RecipeError, Task

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Artifact:
    """A checkpoint that was found and whose hashes are right.

    Attributes:
        name: the card's, or the folder's.
        base_model: the model that it was trained from, with what is known about it.
        max_length: tokens that rows are padded to, as the recipe had it.
        load_float: loads the FP32 model.
        load_simulation: loads the W8A8 simulation.
        tokenizer_source: a folder or Hub id.
        hashes: sha256 of its files and of the base's weights.
        fp32_is: what the FP32 model is, for the reader of a table.
        card: the zoo's, where there is one.
    """

    name: str
    base_model: str
    max_length: int
    load_float: Callable[[], PreTrainedModel]
    load_simulation: Callable[[], QuantSim]
    tokenizer_source: str
    hashes: Mapping[str, str]
    fp32_is: str
    card: Card | None = field(default=None, repr=False)

    def load_trainable(self) -> PreTrainedModel:
        """The FP32 model of a card, in the low-rank form in which it was trained."""
        assert self.card is not None
        return load_trainable(self.card, lambda _: self.tokenizer_source)

    def tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """The tokenizer, if it fits an embedding of ``vocabulary`` rows.

        Raises:
            RecipeError: it cannot be loaded, or knows more tokens than the model.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.tokenizer_source)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.name}: no tokenizer in {self.tokenizer_source} ({error})") from error
        if len(tokenizer) > vocabulary:
            raise RecipeError(
                f"{self.name}: the tokenizer of {self.tokenizer_source} knows {len(tokenizer)} tokens, the model {vocabulary}; "
                "put the files of the right tokenizer (tokenizer.json, tokenizer_config.json) beside the checkpoint"
            )
        return tokenizer


def resolve(model_config: str, checkpoint: str | None, task: Task, base_model: str | None = None) -> Artifact:
    """Find and check what is to be evaluated.

    Args:
        model_config: a name of ``recipes.tasks.MODEL_CONFIGS``; evaluated where no checkpoint is given.
        checkpoint: a folder (a bundle, or written by ``QuantSim.save_pretrained``), a card's name, a Hub id ``owner/name`` or
            ``owner/name@revision`` of a repository that holds a bundle, or the URL of one.
        task: what the checkpoint must be for.
        base_model: a folder or Hub id to take the base's weights from; the hash in the card decides if they are the right ones.

    Raises:
        CheckpointError: not published, not to be had, a folder that holds no checkpoint, a file that its card does not describe.
        RecipeError: no such checkpoint, or one of another task.
    """
    if checkpoint is None:
        return from_card(find(model_config), task, base_model)
    folder = Path(checkpoint)
    if folder.is_dir():
        if (folder / CARD).is_file():
            return from_card(_here(read_card(folder)), task, base_model)
        if is_checkpoint(folder):
            return from_folder(folder, task)
        raise RecipeError(f"--checkpoint {checkpoint}: holds neither {CARD} (a bundle) nor a checkpoint of QuantSim.save_pretrained")
    if checkpoint in names():
        return from_card(find(checkpoint), task, base_model)
    if place := place_of(checkpoint):
        try:
            return from_card(fetch_card(place), task, base_model)
        except CheckpointError as error:
            raise CheckpointError(f"--checkpoint {checkpoint}: no folder here, so it was looked for at {place}: {error}") from error
    raise RecipeError(
        f"--checkpoint {checkpoint}: no such folder, no Hub id (owner/name) or URL, and no published checkpoint either "
        f"(published: {', '.join(published()) or 'none'}; nearest: {near(checkpoint, published(), 1)})"
    )


def _here(card: Card) -> Card:
    """A card that was found in a folder: its files are beside it, wherever else they may be had."""
    return replace(card, where=BUNDLED) if card.files else card


def from_card(card: Card, task: Task, base_model: str | None = None) -> Artifact:
    """A card's checkpoint: fetched where it is elsewhere, verified."""
    if card.task != task.name:
        raise RecipeError(f"{card.path}: is a checkpoint for {card.task}; expected one for {task.name}")
    card = fetch_files(card)
    verify(card)
    name = card.base_model["name"]
    source = base_model_folder(base_model or name)
    if not Path(source).is_dir():
        hub_reachable()  # where it is not, the library fails now and not after its retries
    return Artifact(
        name=card.name,
        base_model=f"{name} (weights sha256 {card.base_model['sha256'][:12]}…)",
        max_length=_length(card.hyper_parameters, task),
        load_float=lambda: load_float(card, lambda _: source),
        load_simulation=lambda: load_simulation(card, lambda _: source),
        tokenizer_source=source,
        hashes={**{file: record["sha256"] for file, record in card.files.items()}, "base_model": card.base_model["sha256"]},
        fp32_is="the fine-tuned FP32 model",
        card=card,
    )


def _length(hyper_parameters: Mapping[str, Any], task: Task) -> int:
    length = hyper_parameters.get("max_length", task.max_length)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise CheckpointError(f"{CARD}: hyper_parameters.max_length is {length!r}; expected a number of tokens")
    return length


def from_folder(folder: Path, task: Task) -> Artifact:
    """A folder of ``QuantSim.save_pretrained``: its FP32 side is its own weights without any quantizer."""
    config = _model_config(folder)
    own_tokenizer = (folder / "tokenizer_config.json").is_file() or (folder / "vocab.txt").is_file()
    hashes = {name: file_sha256(folder / name) for name in (WEIGHTS, MODEL_CONFIG) if (folder / name).is_file()}
    return Artifact(
        name=folder.resolve().name,
        base_model=f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide (from the checkpoint itself)",
        max_length=min(task.max_length, config.max_position_embeddings),
        load_float=lambda: _weights(folder),
        load_simulation=lambda: QuantSim.from_pretrained(folder),
        tokenizer_source=str(folder) if own_tokenizer else base_model_folder(DEFAULT_BASE),
        hashes=hashes,
        fp32_is="the checkpoint's own weights, unquantized and with the model's own attention mask",
    )


def _weights(folder: Path) -> PreTrainedModel:
    model = read_checkpoint(folder).build()
    assert isinstance(model, PreTrainedModel)  # it was built from a class name of transformers
    return model


def _model_config(folder: Path) -> transformers.PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MODEL_CONFIG}: not a model config of transformers ({error})") from error
