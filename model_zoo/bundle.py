"""A checkpoint as what differs from its base model: one safetensors file of a few MB, never a pickle.

A file holds whole tensors under their ``state_dict`` names, pairs ``<name>.low_rank.up`` ``[out, rank]`` and
``<name>.low_rank.down`` ``[rank, in]`` that stand for ``base + up @ down``, and for a quantized model its ranges,
``quantizers.<name>.min`` / ``.max``. Everything else is the base's. Weights may be in float16 (:func:`in_half`) and are used in the
model's dtype.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_zoo.cards import Card, check_file
from model_zoo.format import CONFIG, FP32, W8A8
from quantsim import CheckpointError, ConfigError, QuantConfig, QuantSim, State
from quantsim.config import near
from recipes.base_model import base_model_folder, base_weights_sha256
from recipes.low_rank import go_on_low_rank
from recipes.tasks import RecipeError

UP, DOWN, RANGES = ".low_rank.up", ".low_rank.down", "quantizers."


@dataclass(frozen=True)
class Delta:
    """What a file holds, sorted: ``whole[name]``, ``low_rank[name] = (up, down)``, ``ranges["<quantizer>.min"]``."""

    whole: Mapping[str, Tensor]
    low_rank: Mapping[str, tuple[Tensor, Tensor]]
    ranges: Mapping[str, Tensor]

    @property
    def weights(self) -> set[str]:
        """The names of the weights that the file changes."""
        return set(self.whole) | set(self.low_rank)


# ---- write ----


def in_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a published file holds: float32 weights in float16, which halves it.

    A weight is then off by up to 2⁻¹¹ of itself (2⁻²⁵ where it is below 2⁻¹⁴), far less than half a step of an 8-bit grid. A
    checkpoint is measured on the files as they are written (``publish.write_bundle``), so its figures are those of the rounded
    weights. A tensor with a value that float16 does not reach, and every range, stays as it is.

    >>> halved = in_half({"small": torch.tensor([0.1]), "large": torch.tensor([1e6]), "quantizers.x.min": torch.tensor([-0.1])})
    >>> [x.dtype for x in halved.values()]
    [torch.float16, torch.float32, torch.float32]
    """
    return {name: x if name.startswith(RANGES) else _half(x) for name, x in tensors.items()}


def _half(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    half = x.to(torch.float16)
    return half if half.isfinite().all() else x


def write_delta(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file; it appears under its name only when it is complete.

    Raises:
        CheckpointError: no tensors, values that are not finite, or half of a low-rank pair.
    """
    path = Path(path)
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    if not plain:
        raise CheckpointError(f"{path}: no tensors to write; a checkpoint that equals its base needs no file")
    _check_values(path, plain)
    _sort(path, plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as staging:
        file = Path(staging) / path.name
        safetensors.torch.save_file(plain, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes it its owner's alone
        file.replace(path)


# ---- read ----


def read_delta(path: str | Path) -> Delta:
    """Read a file and check what can be checked without a model.

    Raises:
        CheckpointError: missing, no whole safetensors file, values that are not finite, half of a pair, a pair of two ranks.
    """
    path = Path(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; restore it or train it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Nothing in it was executed; restore it") from error
    _check_values(path, tensors)
    return _sort(path, tensors)


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds {int((~x.isfinite()).sum())} values that are not finite")


def _sort(path: Path, tensors: Mapping[str, Tensor]) -> Delta:
    whole, ranges = {}, {}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        if key.startswith(RANGES):
            ranges[key.removeprefix(RANGES)] = x
        elif key.endswith((UP, DOWN)):
            name, _, side = key.rpartition(".low_rank.")
            factors.setdefault(name, {})[side] = x
        else:
            whole[key] = x
    low_rank = {}
    for name, pair in factors.items():
        if missing := {"up", "down"} - set(pair):
            raise CheckpointError(f"{path}: no tensor {name}.low_rank.{missing.pop()} beside its other half")
        up, down = pair["up"], pair["down"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{path}: {name}.low_rank is {list(up.shape)} @ {list(down.shape)}; expected [out, rank] @ [rank, in] of one rank"
            )
        if name in whole:
            raise CheckpointError(f"{path}: {name} is there whole and as a low-rank pair; expected one of them")
        low_rank[name] = (up, down)
    return Delta(whole, low_rank, ranges)


def apply_delta(model: nn.Module, path: str | Path) -> None:
    """Make a base model the checkpoint: replace the whole tensors, add the low-rank products. Ranges are left aside.

    All of the file is checked before the model changes.

    Raises:
        CheckpointError: as :func:`read_delta`; a name, shape or dtype that the model does not have.
    """
    delta = read_delta(path)
    _check_fits(model, delta, Path(path))
    _apply(model, delta)


def _check_fits(model: nn.Module, delta: Delta, path: Path) -> None:
    state = model.state_dict()
    if unknown := sorted(delta.weights - set(state)):
        raise CheckpointError(
            f"{path}: {type(model).__name__} has no weight {unknown[0]} (nearest: {near(unknown[0], state, 1)}); {len(unknown)} such names"
        )
    for name, x in delta.whole.items():
        _check_fit(path, name, list(x.shape), _used_as(x, state[name]), state[name])
    for name, (up, down) in delta.low_rank.items():
        _check_fit(path, f"{name}{UP} @ {DOWN[1:]}", [up.shape[0], down.shape[1]], _used_as(up, state[name]), state[name])
        _check_fit(path, name + DOWN, list(state[name].shape), _used_as(down, state[name]), state[name])


@torch.no_grad()
def _apply(model: nn.Module, delta: Delta) -> None:
    state = model.state_dict()
    for name, x in delta.whole.items():
        state[name].copy_(x)
    for name, (up, down) in delta.low_rank.items():
        base = state[name]  # [out, in]
        base.copy_(base + up.to(base) @ down.to(base))


def _used_as(x: Tensor, expected: Tensor) -> torch.dtype:
    """The dtype in which a stored weight is used: float16 is only how a float32 weight is stored."""
    return torch.float32 if x.dtype == torch.float16 and expected.dtype == torch.float32 else x.dtype


def _check_fit(path: Path, name: str, shape: list[int], dtype: torch.dtype, expected: Tensor) -> None:
    if shape != list(expected.shape) or dtype != expected.dtype:
        raise CheckpointError(f"{path}: {name} is {shape} of {dtype}; the model has {list(expected.shape)} of {expected.dtype}")


# ---- a card's models ----


def load_float(card: Card, base_model_loader: Callable[[str], str] = base_model_folder) -> PreTrainedModel:
    """The published FP32 model, in eval mode.

    Args:
        card: of ``model_zoo.cards``.
        base_model_loader: a base model's name → a folder or Hub id that ``transformers`` reads.

    Raises:
        CheckpointError: a file that is missing, changed or does not fit; a base model that is absent or another one.
    """
    return _load(card, FP32, base_model_loader)[0]


def load_trainable(card: Card, base_model_loader: Callable[[str], str] = base_model_folder) -> PreTrainedModel:
    """The published FP32 model as it was trained: low-rank pairs are factors that go on training, over the frozen base.

    Its delta (``recipes.low_rank.low_rank_delta``) has the size of the card's. Arguments and errors as :func:`load_float`.
    """
    return _load(card, FP32, base_model_loader, factors=True)[0]


def load_simulation(card: Card, base_model_loader: Callable[[str], str] = base_model_folder) -> QuantSim:
    """The published W8A8 model with its learned ranges, fixed, in eval mode. Arguments and errors as :func:`load_float`."""
    model, delta = _load(card, W8A8, base_model_loader)
    try:
        config = QuantConfig.from_dict(card.quantization)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{card.path}: quantization: {error}") from error
    sim = QuantSim(model, config, in_place=True)
    _load_ranges(sim, delta, card.folder / W8A8)
    return sim


def _load_ranges(sim: QuantSim, delta: Delta, path: Path) -> None:
    quantizers = sim.quantizers
    needed = {f"{name}.{part}": x for name, q in quantizers.items() for part, x in q.range_tensors().items()}
    missing, unknown = sorted(set(needed) - set(delta.ranges)), sorted(set(delta.ranges) - set(needed))
    if missing or unknown:
        raise CheckpointError(
            f"{path}: ranges do not fit the model; missing {missing[:3] or 'none'} ({len(missing)}), "
            f"unknown {unknown[:3] or 'none'} ({len(unknown)})"
        )
    for name, x in delta.ranges.items():
        _check_fit(path, RANGES + name, list(x.shape), x.dtype, needed[name])
    for name, quantizer in quantizers.items():
        low, high = delta.ranges[f"{name}.min"], delta.ranges[f"{name}.max"]
        if (low > high).any():
            raise CheckpointError(f"{path}: {RANGES}{name}.min is above .max in {int((low > high).sum())} of {low.numel()} places")
        quantizer.restore(State.FIXED, {part: delta.ranges[f"{name}.{part}"] for part in quantizer.range_tensors()})


def _load(card: Card, file: str, base_model_loader: Callable[[str], str], factors: bool = False) -> tuple[PreTrainedModel, Delta]:
    check_file(card, file)
    check_file(card, CONFIG)
    path = card.folder / file
    delta = read_delta(path)
    model, new = _base_model(card, base_model_loader)
    if lacking := sorted(new - delta.weights):
        raise CheckpointError(f"{path}: no tensor {lacking[0]}, and the base model has none either; {len(lacking)} such names")
    _check_fits(model, delta, path)
    if factors:
        _apply(model, replace(delta, low_rank={}))
        go_on_low_rank(model, delta.low_rank)
    else:
        _apply(model, delta)
    model.train(False)
    return model, delta


def _base_model(card: Card, base_model_loader: Callable[[str], str]) -> tuple[PreTrainedModel, set[str]]:
    """The card's architecture with the base's weights, and the names that the base has no weights for."""
    name = card.base_model["name"]
    folder = base_model_loader(name)
    config = AutoConfig.from_pretrained(card.folder)
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CheckpointError(f"{card.folder / CONFIG}: architectures is {config.architectures}; expected one model class of transformers")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # that a head is new is expected: it is in the file
    try:
        sha256 = base_weights_sha256(folder)
        if sha256 != card.base_model["sha256"]:
            raise CheckpointError(
                f"base model {name}: sha256 of its weights is {sha256}; {card.path} was made from {card.base_model['sha256']}"
            )
        with torch.random.fork_rng(devices=[]):  # a new head's first values are replaced; the caller's random state stays
            loaded: Any = cls.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, RecipeError, SafetensorError) as error:
        raise CheckpointError(f"base model {name}: cannot be read ({error}). {card.base_model['source']}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    return model, set(info["missing_keys"])
