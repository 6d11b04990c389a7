"""What MODEL and CHECKPOINT name: a folder, a Hub id, or a card of the zoo → models and their tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import transformers  # its classes are looked up when they are used: --help need not wait for them

from quantsim import QuantSim
from quantsim.cli.command import CommandError, extra
from quantsim.config import QuantConfig, near
from quantsim.formats.checkpoint import MODEL_CONFIG, is_checkpoint, read_checkpoint
from quantsim.graph.example_inputs import example_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
        name: what the user called it.
        load_float: loads it in floating point; of a checkpoint its own weights, of a card the FP32 model.
        load_simulation: loads the quantized one; ``None`` where there is none.
        tokenizer: loads what it was trained with.
        max_length: tokens that its rows are padded to, where it says so.
        is_card: of the zoo.
    """

    name: str
    load_float: Callable[[], PreTrainedModel]
    load_simulation: Callable[[], QuantSim] | None
    tokenizer: Callable[[], PreTrainedTokenizerBase] = field(repr=False)
    max_length: int | None = None
    is_card: bool = False

    def simulation(self) -> QuantSim:
        """The quantized model.

        Raises:
            CommandError: it is not quantized, or no quantizer of it has a range.
        """
        if self.load_simulation is None:
            raise CommandError(f"{self.name}: is not quantized; expected a checkpoint, which `quantsim quantize` writes")
        sim = self.load_simulation()
        if not any(quantizer.calibrated for quantizer in sim.quantizers.values()):
            raise CommandError(
                f"{self.name}: no quantizer of it is calibrated, so it computes in floating point; "
                "write one with ranges by `quantsim quantize`, or call sim.compute_encodings before saving"
            )
        return sim

    def usual_tokenizer(self, other: str | None = None) -> PreTrainedTokenizerBase:
        """Its own tokenizer, or the one of ``other``, a folder or Hub id."""
        return load_tokenizer(other) if other else self.tokenizer()


def find_source(text: str) -> Source:
    """What ``text`` names: a folder if there is one, then a card of the zoo, then a Hub id.

    Raises:
        CommandError: none of them.
    """
    from model_zoo.format import CARD

    folder = Path(text).expanduser()
    if folder.is_dir():
        if is_checkpoint(folder):
            return _checkpoint(text, folder)
        if (folder / CARD).is_file():
            return _card(text)
        if (folder / MODEL_CONFIG).is_file():
            return _transformers(text, str(folder))
        raise CommandError(f"{text}: holds no {MODEL_CONFIG}; expected what save_pretrained writes")
    if folder.exists():
        raise CommandError(f"{text}: is a file; expected the folder that save_pretrained writes, or a Hub id")
    if text in card_names():
        return _card(text)
    if not HUB_ID.fullmatch(text):
        raise CommandError(f"{text}: no such folder, and no Hub id (owner/name) either; see `quantsim list` for the zoo's cards")
    return _transformers(text, text)


def card_names() -> list[str]:
    """The cards of the zoo."""
    from model_zoo.cards import names

    return names()


def _checkpoint(name: str, folder: Path) -> Source:
    def load_float() -> PreTrainedModel:
        model = read_checkpoint(folder).build()
        assert isinstance(model, transformers.PreTrainedModel)  # it was built from a class name of transformers
        return model

    return Source(name, load_float, lambda: QuantSim.from_pretrained(folder), lambda: load_tokenizer(str(folder)))


def _transformers(name: str, place: str) -> Source:
    config = _config(place)
    return Source(name, lambda: load_model(place, config), None, lambda: load_tokenizer(place))


def _card(text: str) -> Source:
    with extra("recipes"):
        from model_zoo.cards import find, read_card
        from recipes.artifacts import resolve
        from recipes.tasks import find_task
    folder = Path(text).expanduser()
    is_folder = folder.is_dir()
    card = read_card(folder) if is_folder else find(text)
    artifact = resolve(card.name, str(folder) if is_folder else text, find_task(card.task))

    def tokenizer() -> PreTrainedTokenizerBase:
        return load_tokenizer(artifact.tokenizer_source)

    return Source(text, artifact.load_float, artifact.load_simulation, tokenizer, artifact.max_length, is_card=True)


# ---- transformers ----


def load_model(place: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A whole model in float32 and eval mode, of the class that its config names. Code that comes with a model is not run.

    Raises:
        CommandError: no class of ``transformers``, weights that cannot be read, or none for a part of it.
    """
    names = config.architectures or ["AutoModel"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise CommandError(f"{place}: its architecture {names[0]!r} is no model class of transformers; code of a model's own is not run")
    try:  # transformers, the Hub and safetensors have a family of errors each
        model, info = cls.from_pretrained(place, dtype="float32", trust_remote_code=False, output_loading_info=True)
    except Exception as error:
        raise CommandError(f"{place}: its weights cannot be read ({type(error).__name__}: {error})") from error
    if lacking := sorted(info["missing_keys"]):
        raise CommandError(
            f"{place}: has no weights for {', '.join(lacking[:3])} ({len(lacking)} of {type(model).__name__}); they would be random. "
            f"Set architectures in {MODEL_CONFIG} to the class that was saved"
        )
    assert isinstance(model, transformers.PreTrainedModel)
    model.train(False)
    return model


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub.

    Raises:
        CommandError: there is none, it has no vocabulary, or it cannot pad.
    """
    _ask_the_hub(place)
    advice = "put its files there (tokenizer.json, tokenizer_config.json), or name another place by --tokenizer"
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise CommandError(f"{place}: no tokenizer can be read there ({error}); {advice}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without a vocabulary
        raise CommandError(f"{place}: no tokenizer there; {advice}")
    if tokenizer.pad_token is None:
        raise CommandError(f"{place}: its tokenizer has no pad token, and rows are padded to one length; set pad_token in it")
    return tokenizer


def _config(place: str) -> PreTrainedConfig:
    _ask_the_hub(place)
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise CommandError(f"{place}: {_not_there(place)} ({error})") from error
    return config


def _ask_the_hub(place: str) -> None:
    """Where nobody answers, the libraries then fail within seconds and not after their retries."""
    if not Path(place).is_dir():
        with suppress(ImportError):
            from recipes.hub import hub_reachable

            hub_reachable()


def _not_there(place: str) -> str:
    if Path(place).is_dir():
        return f"its {MODEL_CONFIG} cannot be read"
    return f"no such folder, no card of the zoo (nearest: {near(place, card_names(), 1)}), and nothing from the Hub"


# ---- simulate ----


def simulate(name: str, model: PreTrainedModel, config: QuantConfig) -> QuantSim:
    """The simulation of a model that nobody else needs.

    Raises:
        CommandError: it takes neither ids nor pixels.
        ConfigError, TraceError: as :class:`QuantSim`.
    """
    try:
        inputs = example_inputs(model)
    except ValueError as error:
        raise CommandError(f"{name}: {error}") from error
    return QuantSim(model, config, inputs, in_place=True)
