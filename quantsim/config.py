"""What to quantize, and how: frozen values, validated where they are made, JSON in and out.

A :class:`QuantConfig` is policy alone. It never touches a model; ``quantsim.graph.place`` turns a
config and a graph into a list of placements.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

EstimatorName = Literal["min_max", "running_min_max", "percentile", "mse", "sqnr"]
Role = Literal["weight", "activation", "input"]
Grouping = Literal["range", "order"]
Follow = Literal["no", "ema", "dynamic"]

MIN_BITS, MAX_BITS = 2, 16


class ConfigError(ValueError):
    """A configuration that cannot mean anything: the message names the field, its value and what fits."""


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.0)
    return ", ".join(close) if close else "none"


def _expect(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{field}: {value!r}; expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_fields(what: str, values: Mapping[str, Any], cls: type) -> None:
    _expect(isinstance(values, Mapping), what, values, "a JSON object")
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{what}: no field {name!r}; the fields are {', '.join(known)} (nearest: {near(name, known, 1)})")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``, ``x_hat = (q - zero_point) * scale``.

    Attributes:
        bits: 2 to 16.
        symmetric: zero point 0 on the grid ``-2**(bits-1) … 2**(bits-1) - 1``; else ``0 … 2**bits - 1``.
        axis: the axis that keeps a range of its own, ``None`` for one range per tensor.
            A weight ``[out, in]`` with ``axis=0`` has ``out`` ranges.
        estimator: how calibration turns values into a range (``quantsim.quantizers.range_estimators``).
        learn: the range is trained after calibration (range learning), or stays fixed.
        percentile: for ``estimator="percentile"``, in percent, above 50.
        momentum: for ``estimator="running_min_max"``, and for ``follow="ema"``, the weight of the past.
        groups: so many ranges along ``axis`` in place of one each, for activations: per-embedding-group quantization (Bondarenko et
            al., 2021). A group's range holds those that the estimator finds for its channels.
        group_by: channels of like ``range`` share a group (they are sorted by its width), or neighbours in ``order``; the groups are
            equal in size, to one channel.
        follow: the range follows the values while the model is trained, in place of being learned (``quantsim.quantizers.following``):
            ``"ema"``, an average that the first tensor begins; ``"dynamic"``, each tensor's own (of activations in evaluation too).
        start_step: with ``follow``, so many forward passes in training leave the edge in floating point before.
        straight_through: the gradient passes where values are clipped too.

    >>> QuantSpec(bits=4, symmetric=True, axis=0).quant_min
    -8
    """

    bits: int = 8
    symmetric: bool = False
    axis: int | None = None
    estimator: EstimatorName = "min_max"
    learn: bool = True
    percentile: float = 99.99
    momentum: float = 0.9
    groups: int | None = None
    group_by: Grouping = "range"
    follow: Follow = "no"
    start_step: int = 0
    straight_through: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        _expect(whole and MIN_BITS <= self.bits <= MAX_BITS, "QuantSpec.bits", self.bits, f"an integer from {MIN_BITS} to {MAX_BITS}")
        _expect(isinstance(self.symmetric, bool), "QuantSpec.symmetric", self.symmetric, "true or false")
        _expect(isinstance(self.learn, bool), "QuantSpec.learn", self.learn, "true or false")
        is_axis = self.axis is None or (isinstance(self.axis, int) and not isinstance(self.axis, bool))
        _expect(is_axis, "QuantSpec.axis", self.axis, "an axis number, or null for per tensor")
        names = get_args(EstimatorName)
        _expect(self.estimator in names, "QuantSpec.estimator", self.estimator, f"one of {', '.join(names)}")
        in_range = _is_number(self.percentile) and 50.0 < self.percentile <= 100.0
        _expect(in_range, "QuantSpec.percentile", self.percentile, "a number in (50, 100]")
        _expect(_is_number(self.momentum) and 0.0 <= self.momentum < 1.0, "QuantSpec.momentum", self.momentum, "a number in [0, 1)")
        is_count = self.groups is None or (isinstance(self.groups, int) and not isinstance(self.groups, bool) and self.groups > 0)
        _expect(is_count, "QuantSpec.groups", self.groups, "a number of groups, or null for none")
        _expect(self.group_by in get_args(Grouping), "QuantSpec.group_by", self.group_by, f"one of {', '.join(get_args(Grouping))}")
        _expect(self.follow in get_args(Follow), "QuantSpec.follow", self.follow, f"one of {', '.join(get_args(Follow))}")
        is_count = isinstance(self.start_step, int) and not isinstance(self.start_step, bool) and self.start_step >= 0
        _expect(is_count, "QuantSpec.start_step", self.start_step, "a number of steps, 0 for none")
        _expect(self.follow == "no" or self.groups is None, "QuantSpec.groups", self.groups, "null where the range follows the values")
        _expect(isinstance(self.straight_through, bool), "QuantSpec.straight_through", self.straight_through, "true or false")

    @property
    def quant_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        return (1 << (self.bits - 1 if self.symmetric else self.bits)) - 1

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        where = "per tensor" if self.axis is None else f"per channel (axis {self.axis})"
        if self.axis is not None and self.groups is not None:
            where = f"in {self.groups} groups by {self.group_by} (axis {self.axis})"
        return f"{self.bits}-bit {kind} {where}" + (f", {self.follow}" if self.follow != "no" else "")

    def to_dict(self) -> dict[str, Any]:
        """Its fields; those of groups and of ranges that follow only where they ask for something."""
        given, always = QuantSpec(), ("bits", "symmetric", "axis", "estimator", "learn", "percentile", "momentum")
        values = {name: x for name, x in asdict(self).items() if name in always or x != getattr(given, name)}
        return values if self.groups is None else values | {"group_by": self.group_by}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        _check_fields("QuantSpec", values, cls)
        return cls(**values)


@dataclass(frozen=True)
class Rule:
    """An exception to the defaults. Everything that is given must match; later rules win.

    Attributes:
        op: an op (``"linear"``, ``"add"``) or a role found by dataflow (``"mask_add"``, ``"residual"``); see ``quantsim.graph.roles``.
        module: an ``fnmatch`` pattern over placement names (``"*.layer.0.*.output"``).
        role: ``"weight"``, ``"activation"`` or ``"input"``.
        enabled: false leaves what matches unquantized, true quantizes it again, null changes nothing.
        set: fields of :class:`QuantSpec` to change, where a quantizer is.
        optional: may match nothing (presets serve many models); else a rule that matches nothing is an error.
        reason: printed beside what the rule leaves unquantized.

    >>> Rule(op="layer_norm", role="weight", set={"symmetric": False}).set
    (('symmetric', False),)
    """

    op: str | None = None
    module: str | None = None
    role: Role | None = None
    enabled: bool | None = None
    set: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    optional: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        if self.op is None and self.module is None and self.role is None:
            raise ConfigError("Rule: names no op, no module and no role; give at least one (change the defaults to change everything)")
        for name in ("op", "module"):
            value = getattr(self, name)
            _expect(value is None or isinstance(value, str), f"Rule.{name}", value, "a pattern, or null for any")
        _expect(self.role in (None, *get_args(Role)), "Rule.role", self.role, f"one of {', '.join(get_args(Role))}")
        _expect(self.enabled is None or isinstance(self.enabled, bool), "Rule.enabled", self.enabled, "true, false or null")
        _expect(isinstance(self.optional, bool), "Rule.optional", self.optional, "true or false")
        _expect(isinstance(self.reason, str), "Rule.reason", self.reason, "text")
        _expect(isinstance(self.set, (Mapping, tuple)), "Rule.set", self.set, "an object with fields of QuantSpec")
        changes = dict(self.set)
        _check_fields("Rule.set", changes, QuantSpec)
        QuantSpec(**changes)
        object.__setattr__(self, "set", tuple(sorted(changes.items())))

    def apply(self, spec: QuantSpec) -> QuantSpec:
        return replace(spec, **dict(self.set)) if self.set else spec

    def __str__(self) -> str:
        what = [f"{name}={value!r}" for name in ("op", "module", "role") if (value := getattr(self, name)) is not None]
        return f"rule({', '.join(what)})"

    def to_dict(self) -> dict[str, Any]:
        defaults = {f.name: f.default for f in fields(self)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != defaults[f.name]}
        return values | ({"set": dict(self.set)} if self.set else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        _check_fields("Rule", values, cls)
        return cls(**values)


@dataclass(frozen=True)
class PostTraining:
    """What calibration does beside finding ranges, in this order. Each changes the simulation's weights, none what they are for.

    Attributes:
        smooth: moves outliers from activations into weights (``quantsim.rewrites.scale_channels``): 0 leaves weights as easy to
            quantize as they are, 1 activations as easy as they can be, ``None`` does nothing. The float model computes what it did.
        adaround: optimizer steps for each linear in which it is learned which weights to round up and which down
            (``quantsim.post_training.adaround``); 0 rounds to nearest.
        bias_correction: the mean error of each op with a bias is added to the bias (``quantsim.post_training.bias_correction``).

    >>> PostTraining(smooth=0.5, bias_correction=True).to_dict()
    {'smooth': 0.5, 'bias_correction': True}
    """

    smooth: float | None = None
    adaround: int = 0
    bias_correction: bool = False

    def __post_init__(self) -> None:
        part = self.smooth is None or (_is_number(self.smooth) and 0 <= self.smooth <= 1)
        _expect(part, "PostTraining.smooth", self.smooth, "a number from 0 to 1, or null for none")
        count = isinstance(self.adaround, int) and not isinstance(self.adaround, bool) and self.adaround >= 0
        _expect(count, "PostTraining.adaround", self.adaround, "a number of steps, 0 for none")
        _expect(isinstance(self.bias_correction, bool), "PostTraining.bias_correction", self.bias_correction, "true or false")

    def __bool__(self) -> bool:
        return self != PostTraining()

    def to_dict(self) -> dict[str, Any]:
        """The fields that ask for something."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        _check_fields("PostTraining", values, cls)
        return cls(**values)


@dataclass(frozen=True)
class QuantConfig:
    """The whole policy of a simulation. The default is W8A8 of the ``aimet`` preset without its exceptions.

    Attributes:
        weights: the spec of every weight; ``None`` leaves weights in floating point.
        activations: the spec of every op's output; ``None`` leaves activations in floating point.
        inputs: floating-point model inputs are quantized (integer ids never are).
        mask_clamp: the value that takes the place of the attention mask's large negative one; ``None`` keeps the mask.
        supergroups: op sequences that run as one: only the last output is quantized, as ``("linear", "gelu")``.
        activations_before: only activations that one of these ops reads are quantized (``("linear",)``: what an integer product
            takes); empty quantizes all.
        float_elsewhere: what ``activations_before`` quantizes stays in floating point for other readers (a residual's sum).
        rules: exceptions, later ones winning.
        post_training: what calibration does to weights, beside finding ranges; nothing by default.
        name: the preset's name, for reports.

    Biases are not quantized: integer kernels add them in 32 bits.

    >>> QuantConfig.preset("aimet").mask_clamp
    -6.0
    """

    weights: QuantSpec | None = field(default_factory=lambda: QuantSpec(symmetric=True, axis=0))
    activations: QuantSpec | None = field(default_factory=QuantSpec)
    inputs: bool = True
    mask_clamp: float | None = -6.0
    supergroups: tuple[tuple[str, ...], ...] = ()
    activations_before: tuple[str, ...] = ()
    float_elsewhere: bool = False
    rules: tuple[Rule, ...] = ()
    post_training: PostTraining = PostTraining()
    name: str = "custom"

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            spec = getattr(self, name)
            _expect(spec is None or isinstance(spec, QuantSpec), f"QuantConfig.{name}", spec, "a QuantSpec, or null for none")
        if self.activations is not None and self.activations.axis is not None:
            raise ConfigError(
                "QuantConfig.activations.axis: activations are quantized per tensor by default; use a rule for one edge's axis"
            )
        _expect(isinstance(self.inputs, bool), "QuantConfig.inputs", self.inputs, "true or false")
        negative = self.mask_clamp is None or (_is_number(self.mask_clamp) and -1e4 < self.mask_clamp < 0)
        _expect(negative, "QuantConfig.mask_clamp", self.mask_clamp, "a number in (-10000, 0), or null to keep the model's mask")
        _expect(isinstance(self.supergroups, (tuple, list)), "QuantConfig.supergroups", self.supergroups, "a list of lists of ops")
        for group in self.supergroups:
            several = isinstance(group, (tuple, list)) and len(group) > 1
            _expect(several, "QuantConfig.supergroups", group, "at least two ops in each supergroup")
        groups = tuple(tuple(group) for group in self.supergroups)
        before = self.activations_before
        _expect(isinstance(before, (tuple, list)), "QuantConfig.activations_before", before, "a list of ops")
        _expect(isinstance(self.float_elsewhere, bool), "QuantConfig.float_elsewhere", self.float_elsewhere, "true or false")
        are_rules = isinstance(self.rules, (tuple, list)) and all(isinstance(rule, Rule) for rule in self.rules)
        _expect(are_rules, "QuantConfig.rules", self.rules, "a list of rules")
        _expect(isinstance(self.post_training, PostTraining), "QuantConfig.post_training", self.post_training, "a PostTraining")
        _expect(isinstance(self.name, str), "QuantConfig.name", self.name, "text")
        object.__setattr__(self, "supergroups", groups)
        object.__setattr__(self, "activations_before", tuple(before))
        object.__setattr__(self, "rules", tuple(self.rules))

    def with_rules(self, *rules: Rule) -> Self:
        """The same config with more rules, which win over those it has."""
        return replace(self, rules=(*self.rules, *rules))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": self.weights and self.weights.to_dict(),
            "activations": self.activations and self.activations.to_dict(),
            "inputs": self.inputs,
            "mask_clamp": self.mask_clamp,
            "supergroups": [list(group) for group in self.supergroups],
            "activations_before": list(self.activations_before),
            "rules": [rule.to_dict() for rule in self.rules],
            **({"float_elsewhere": True} if self.float_elsewhere else {}),
            **({"post_training": self.post_training.to_dict()} if self.post_training else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        _check_fields("QuantConfig", values, cls)
        known = dict(values)
        for name in ("weights", "activations"):
            if known.get(name) is not None:
                known[name] = QuantSpec.from_dict(known[name])
        if "post_training" in known:
            known["post_training"] = PostTraining.from_dict(known["post_training"])
        rules = known.get("rules", ())
        _expect(isinstance(rules, (list, tuple)), "QuantConfig.rules", rules, "a list of rules")
        known["rules"] = tuple(Rule.from_dict(rule) for rule in rules)
        return cls(**known)

    @classmethod
    def preset(cls, name: str) -> Self:
        """A config by name; ``QuantConfig.presets()`` lists the names."""
        if name not in cls.presets():
            raise ConfigError(f"no preset {name!r}; the presets are {', '.join(cls.presets())} (nearest: {near(name, cls.presets(), 1)})")
        text = resources.files("quantsim").joinpath("presets", f"{name}.json").read_text()
        return replace(cls.from_dict(json.loads(text)), name=name)

    @staticmethod
    def presets() -> list[str]:
        folder = resources.files("quantsim").joinpath("presets")
        return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from error
        return cls.from_dict(values)
