"""A recipe: everything that decides what a training run gives, read from YAML, each field open to a flag of its name."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from quantsim.config import EstimatorName, QuantConfig, near
from quantsim.sim import resolve_config
from recipes.tasks import RecipeError


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the training loop.

    Attributes:
        lr: peak learning rate; for low-rank training that of the factors.
        whole_lr: peak learning rate of what low-rank training trains whole (norms, biases, pooler, head); ``None`` is ``lr``.
        epochs: passes over the rows.
        batch: rows an optimizer step sees, over all devices and accumulated batches.
        accumulate: forward passes an optimizer step takes; must divide ``batch``.
        warmup_ratio: part of all steps in which the rate rises to its peak.
        schedule: what it does then, by ``transformers``' name.
        weight_decay: on matrices alone; norms, biases and ranges have none.
        hidden_dropout, attention_dropout: the model's dropouts in this run.
        clip: largest norm of the gradient of the weights (ranges are not clipped).
        mixed_precision: ``bf16`` autocast, or ``no``.
    """

    lr: float
    whole_lr: float | None = None
    epochs: int
    batch: int
    accumulate: int = 1
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: float = 0.01
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    clip: float = 1.0
    mixed_precision: Literal["bf16", "no"] = "bf16"

    def __post_init__(self) -> None:
        _positive(self, "lr", "epochs", "batch", "accumulate", "clip", *(["whole_lr"] if self.whole_lr is not None else []))
        _parts(self, "warmup_ratio", "hidden_dropout", "attention_dropout")
        if self.batch % self.accumulate:
            raise RecipeError(f"accumulate: {self.accumulate}; expected a divisor of batch, which is {self.batch}")


@dataclass(frozen=True, kw_only=True)
class Intermediate(Training):
    """Training on another task before.

    Attributes:
        task, split: what to train on.
        label_map: its label → ours (MNLI's neutral and contradiction → RTE's not_entailment); ``None`` keeps labels. With
            another number of labels than the task's the head is drawn anew afterwards.
    """

    task: str
    split: str = "train"
    label_map: Mapping[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """``(1 - weight) * loss + weight * temperature² * KL(teacher / temperature ‖ student / temperature)``.

    The teacher is the FP32 model that the quantized one was made from. For regression the second term is the squared
    difference of the logits.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _parts(self, "weight")
        _positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class Qat(Training):
    """Quantization-aware training of weights and ranges.

    Attributes:
        range_lr: peak learning rate of the ranges.
        freeze_ranges_last: part of the steps, at the end, in which ranges are fixed.
        distillation: learn from the FP32 model too.
    """

    range_lr: float = 1e-3
    weight_decay: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    mixed_precision: Literal["bf16", "no"] = "no"
    freeze_ranges_last: float = 0.0
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _parts(self, "freeze_ranges_last")
        _positive(self, "range_lr")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``rows`` training rows, drawn by the recipe's seed, in batches of ``batch``; how values become ranges."""

    rows: int = 64
    batch: int = 16
    estimator: EstimatorName = "min_max"
    weight_estimator: EstimatorName = "min_max"

    def __post_init__(self) -> None:
        _positive(self, "rows", "batch")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """``preset``: a preset's name or a JSON file of a :class:`QuantConfig`."""

    preset: str = "aimet"
    calibration: Calibration = field(default_factory=Calibration)

    def config(self) -> QuantConfig:
        config, ranges = resolve_config(self.preset), self.calibration
        return replace(
            config,
            weights=config.weights and replace(config.weights, estimator=ranges.weight_estimator),
            activations=config.activations and replace(config.activations, estimator=ranges.estimator),
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """From a base model to a quantized classifier.

    Attributes:
        name: of the bundle that comes out.
        base_model: a Hub id or a folder.
        task: a name of ``recipes.tasks``.
        dataset: a Hub id, or a folder in the Hub's layout.
        max_length: tokens a pair is cut to; quantized models are trained and evaluated padded to it.
        seed: of heads, factors, order of rows, dropout and calibration rows.
        method: ``low_rank`` (``W + up @ down`` of ``rank``) or ``full``.
        intermediate: tasks trained before, in order.
    """

    name: str
    base_model: str
    task: str
    dataset: str = "nyu-mll/glue"
    max_length: int = 128
    seed: int = 1000
    method: Literal["low_rank", "full"] = "low_rank"
    rank: int = 16
    intermediate: tuple[Intermediate, ...] = ()
    finetune: Training
    quantization: Quantization = field(default_factory=Quantization)
    qat: Qat

    def __post_init__(self) -> None:
        _positive(self, "max_length", "rank")


def _positive(value: Any, *names: str) -> None:
    for name in names:
        if not getattr(value, name) > 0:
            raise RecipeError(f"{name}: {getattr(value, name)!r}; expected a number above 0")


def _parts(value: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(value, name) <= 1:
            raise RecipeError(f"{name}: {getattr(value, name)!r}; expected a number from 0 to 1")


# ---- read ----


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: the file.
        overrides: dotted field → its value as YAML, as flags give them: ``{"qat.lr": "1e-5", "intermediate.0.epochs": "1"}``.

    Raises:
        RecipeError: no such file or field (the nearest is named), a value of the wrong kind, a field that is missing.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML ({error})") from error
    for name, text in (overrides or {}).items() if values else ():
        _set(values, name, yaml.safe_load(text))
    try:
        return build(Recipe, values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _set(values: Any, name: str, value: Any) -> None:
    """``values["a"]["b"] = value`` for the name ``a.b``; a number is a place in a list."""
    *way, last = name.split(".")
    for depth, part in enumerate([*way, last]):
        if isinstance(values, list) and not (part.isdigit() and int(part) < len(values)):
            raise RecipeError(f"--{name}: {'.'.join(way[:depth])} has the places 0 to {len(values) - 1}, not {part!r}")
        key = int(part) if isinstance(values, list) else part
        if depth == len(way):
            values[key] = value
            return
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[key]
        if not isinstance(values, (dict, list)):
            raise RecipeError(f"--{name}: {'.'.join(way[: depth + 1])} is {values!r} and has no fields")


T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from plain values, every one checked against its field.

    >>> build(Distillation, {"weight": "5e-1"})
    Distillation(weight=0.5, temperature=2.0)
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'recipe'}: {values!r}; expected the fields {', '.join(f.name for f in fields(cls))}")
    known = {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in known:
            raise RecipeError(
                f"{prefix}{name}: no such field; nearest: {prefix}{near(str(name), known, 1)}. The fields are {', '.join(known)}"
            )
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"{prefix}{name}: missing")
    hints = get_type_hints(cls)
    given = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return cls(**given)
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(next(o for o in options if o is not types.NoneType), value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in options else value  # YAML reads a bare no as false
        if value not in options:
            raise RecipeError(f"{where}: {value!r}; expected one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence | None) or isinstance(value, str):
            raise RecipeError(f"{where}: {value!r}; expected a list")
        return tuple(_convert(options[0], x, f"{where}.{i}") for i, x in enumerate(value or ()))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {value!r}; expected pairs as {{0: 0, 1: 1}}")
        return {_convert(options[0], k, where): _convert(options[1], x, where) for k, x in value.items()}
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    try:
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    except ValueError:
        pass
    raise RecipeError(f"{where}: {value!r}; expected {'text' if kind is str else f'a value of type {kind.__name__}'}")
