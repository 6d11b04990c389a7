"""AIMET's quantsim config JSON → :class:`QuantConfig`. Its string booleans and ONNX op names end here.

Source: AIMET's "Quantsim config file" documentation. Sections: ``defaults`` (``ops``, ``params``,
``per_channel_quantization``), ``params``, ``op_type``, ``supergroups``, ``model_input``, ``model_output``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantsim.config import ConfigError, QuantConfig, QuantSpec, Rule, near

OUTPUT, SYMMETRIC, PER_CHANNEL = "is_output_quantized", "is_symmetric", "per_channel_quantization"
PARAM: dict[str, Any] = {"is_quantized": {}, "is_symmetric": {}}
KNOWN: dict[str, Any] = {  # what is read, key by key
    "defaults": {"ops": {OUTPUT: {}, SYMMETRIC: {}}, "params": PARAM, PER_CHANNEL: {}, "strict_symmetric": {}, "unsigned_symmetric": {}},
    "params": {"weight": PARAM, "bias": PARAM},
    "op_type": {OUTPUT: {}, SYMMETRIC: {}, PER_CHANNEL: {}, "params": {"weight": PARAM, "bias": PARAM}},  # of each op
    "model_input": {"is_input_quantized": {}},
    "model_output": {},
}
SECTIONS = {"defaults", "params", "op_type", "supergroups", "model_input", "model_output"}

OPS: dict[str, tuple[str, ...]] = {  # AIMET's (ONNX's) name → ours; ops that keep their input's grid have no quantizer to set
    "Add": ("add",),
    "BatchNormalization": ("batch_norm",),
    "Clip": ("clamp", "hardtanh"),
    "Concat": ("cat",),
    "Conv": ("conv1d", "conv2d", "conv3d"),
    "Div": ("div",),
    "Embedding": ("embedding",),
    "Exp": ("exp",),
    "GELU": ("gelu",),
    "Gather": ("embedding",),
    "Gelu": ("gelu",),
    "Gemm": ("linear", "addmm"),
    "GroupNormalization": ("group_norm",),
    "InstanceNormalization": ("instance_norm",),
    "LayerNormalization": ("layer_norm",),
    "Log": ("log",),
    "MatMul": ("matmul",),
    "Mean": ("mean",),
    "Mul": ("mul",),
    "Pad": ("pad", "constant_pad_nd"),
    "Pow": ("pow",),
    "RMSNormalization": ("rms_norm",),
    "ReduceMean": ("mean",),
    "ReduceSum": ("sum",),
    "Relu": ("relu",),
    "Sigmoid": ("sigmoid",),
    "Softmax": ("softmax",),
    "Sqrt": ("sqrt",),
    "Sub": ("sub",),
    "Sum": ("sum",),
    "Tanh": ("tanh",),
}
KEEP_GRID = frozenset(
    "Cast Constant Dropout Expand Flatten Identity MaxPool Reshape Resize ScatterElements Slice Split Squeeze "
    "Tile Transpose Unsqueeze".split()
)


def is_aimet_config(path: str | Path) -> bool:
    """The file is a JSON object with AIMET's ``defaults``."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "defaults" in values


def read_aimet_config(path: str | Path) -> QuantConfig:
    """The same policy as a :class:`QuantConfig`; the mask clamp, which AIMET's file cannot say, is −6.

    A key that changes nothing here is named in a warning.

    Raises:
        ConfigError: an unknown section, an ``op_type`` of the supergroups that is not known here, a value that is no boolean.
    """
    values = json.loads(Path(path).read_text())
    if unknown := set(values) - SECTIONS:
        raise ConfigError(f"{path}: unknown section {sorted(unknown)}; AIMET's are {', '.join(sorted(SECTIONS))}")
    _warn_of_unread(path, values)
    defaults = _section(path, values, "defaults")
    for name in ("strict_symmetric", "unsigned_symmetric"):
        if _bool(path, defaults, name, False):
            _warn(path, f"defaults.{name} is True", "a symmetric grid here has signed integers, one more of them below zero")
    params, ops = _section(path, defaults, "params"), _section(path, defaults, "ops")
    symmetric_weights = _bool(path, params, "is_symmetric", False)
    per_channel = _bool(path, defaults, "per_channel_quantization", False)
    weights = QuantSpec(symmetric=symmetric_weights, axis=0 if per_channel else None)
    activations = QuantSpec(symmetric=_bool(path, ops, "is_symmetric", False))
    rules = [Rule(op="embedding", role="weight", set={"axis": None}, optional=True)]  # AIMET: channels for convolution and linear alone
    if not _bool(path, params, "is_quantized", False):
        rules.append(Rule(role="weight", enabled=False, optional=True, reason="defaults.params.is_quantized is not True"))
    if not _bool(path, ops, "is_output_quantized", False):
        rules.append(Rule(role="activation", enabled=False, optional=True, reason="defaults.ops.is_output_quantized is not True"))
    rules += _param_rules(path, _section(path, values, "params"), None)
    op_types = _section(path, values, "op_type")
    for name in op_types:
        if name not in OPS and name not in KEEP_GRID:
            nearest = near(name, [*OPS, *KEEP_GRID], 1)
            warnings.warn(f"{path}: op_type {name!r} is not known here and changes nothing (nearest: {nearest})", stacklevel=2)
        for op in OPS.get(name, ()):
            rules += _op_rules(path, op, _section(path, op_types, name))
    return QuantConfig(
        weights=weights,
        activations=activations,
        inputs=_bool(path, _section(path, values, "model_input"), "is_input_quantized", False),
        supergroups=tuple(group for entry in values.get("supergroups", ()) for group in _supergroup(path, entry)),
        rules=tuple(rules),
        name=Path(path).stem,
    )


def _warn_of_unread(path: str | Path, values: Mapping[str, Any]) -> None:
    for section, known in KNOWN.items():
        given = values.get(section, {})
        for name, inside in given.items() if section == "op_type" and isinstance(given, Mapping) else [("", given)]:
            for key, nearest in _unread(inside, known):
                _warn(path, ".".join(filter(None, (section, name, key))), f"nearest: {nearest}" if nearest else "")


def _unread(given: Any, known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that nobody reads, dotted, and the nearest that somebody does."""
    for key, inside in given.items() if isinstance(given, Mapping) else ():
        if key not in known:
            yield key, near(key, known, 1) if known else ""
        else:
            yield from ((f"{key}.{deeper}", nearest) for deeper, nearest in _unread(inside, known[key]))


def _warn(path: str | Path, what: str, note: str) -> None:
    warnings.warn(f"{path}: {what} changes nothing here" + (f" ({note})" if note else ""), stacklevel=4)


def _op_rules(path: str | Path, op: str, section: Mapping[str, Any]) -> list[Rule]:
    rules = []
    if "is_output_quantized" in section:
        on = _bool(path, section, "is_output_quantized", True)
        rules.append(Rule(op=op, role="activation", enabled=on, optional=True, reason="" if on else "off in the AIMET config"))
    if "is_symmetric" in section:
        rules.append(Rule(op=op, role="activation", set={"symmetric": _bool(path, section, "is_symmetric", False)}, optional=True))
    if "per_channel_quantization" in section and op != "embedding":
        axis = 0 if _bool(path, section, "per_channel_quantization", False) else None
        rules.append(Rule(op=op, role="weight", set={"axis": axis}, optional=True))
    return rules + _param_rules(path, _section(path, section, "params"), op)


def _param_rules(path: str | Path, params: Mapping[str, Any], op: str | None) -> list[Rule]:
    rules = []
    weight = _section(path, params, "weight")
    if _bool(path, _section(path, params, "bias"), "is_quantized", False):
        raise ConfigError(f"{path}: params.bias.is_quantized is True; biases stay unquantized here (integer kernels add them in 32 bits)")
    if "is_quantized" in weight:
        on = _bool(path, weight, "is_quantized", True)
        rules.append(Rule(op=op, role="weight", enabled=on, optional=True, reason="" if on else "off in the AIMET config"))
    if "is_symmetric" in weight:
        rules.append(Rule(op=op, role="weight", set={"symmetric": _bool(path, weight, "is_symmetric", True)}, optional=True))
    return rules


def _supergroup(path: str | Path, entry: object) -> list[tuple[str, ...]]:
    names = entry.get("op_list") if isinstance(entry, dict) else None
    if not isinstance(names, list):
        raise ConfigError(f"{path}: supergroup {entry!r}; expected an object with op_list, a list of ops")
    groups: list[tuple[str, ...]] = [()]
    for name in names:
        if name not in OPS:
            raise ConfigError(f"{path}: supergroup {names} names {name!r}; known ops are {', '.join(OPS)} (nearest: {near(name, OPS, 1)})")
        groups = [(*group, op) for group in groups for op in OPS[name]]
    return groups


def _section(path: str | Path, parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = parent.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: {name} is {section!r}; expected an object")
    return section


def _bool(path: str | Path, section: Mapping[str, Any], name: str, default: bool) -> bool:
    value = section.get(name, default)
    if isinstance(value, bool):
        return value
    if value in ("True", "False"):
        return bool(value == "True")
    raise ConfigError(f'{path}: {name} is {value!r}; expected "True" or "False"')
