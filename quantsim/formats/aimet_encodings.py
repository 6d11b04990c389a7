"""AIMET's encodings files: the ranges of a simulation, written for and read from other programs.

Which quantizer is which entry is decided here; what an entry looks like, in ``quantsim.formats.aimet_layouts``.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from quantsim.config import near
from quantsim.formats.aimet_layouts import ACTIVATIONS, ALL, LAYOUTS, PARAMS, Encoding, Encodings, layout_of
from quantsim.formats.checkpoint import RANGES
from quantsim.formats.json_field import read_json
from quantsim.graph.place import UNSCALED, Placement
from quantsim.numerics.affine import affine_params
from quantsim.numerics.exact_range import exact_range
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, State
from quantsim.quantizers.following import moves_with_tensors

AS_INPUTS = frozenset({"add", "cat", "div", "mul"})
"""Ops without a module whose outputs AIMET quantizes where a module reads them (its ``_is_elementwise_functional``)."""

LATER_CALL = re.compile(r"(.+)\.output_\d+")
"""The name of an edge that a module makes when it is called again."""

NO_MODULE = "no module of its own: the edge of an op between modules"
CALLED_TWICE = "its module is called more than once, and AIMET has one quantizer for all calls"
GROUPS = "its channels share ranges in groups, which no AIMET file has a place for"
NOT_CALIBRATED = "not calibrated, or switched off"
DYNAMIC = "its range is each tensor's own (dynamic); a file holds ranges that are known"


class EncodingsError(ValueError):
    """An encodings file that cannot be written or used: the message names the file, the field, and what was expected."""


@dataclass(frozen=True)
class LoadedEncodings:
    """What was read.

    Attributes:
        loaded: the quantizers that took a range.
        missing: quantizers that the layout can hold and the file does not. They keep what they have.
        left_out: quantizers that the layout has no place for, and why. They keep what they have.
        unknown: fields of the file that belong to no quantizer here.
        inexact: quantizers among ``loaded`` with a scale that is not to the bit the file's: an asymmetric float32 range cannot
            give every scale (``quantsim.numerics.exact_range``). Files written here or by AIMET have none.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left_out: Mapping[str, str]
    unknown: tuple[str, ...]
    inexact: tuple[str, ...]


@dataclass(frozen=True)
class Fields:
    """Which fields of a layout hold a quantizer, by its name, and why others have none."""

    of: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str]


# ---- write ----


@torch.no_grad()
def write_aimet_encodings(
    path: str | Path,
    version: str,
    model: nn.Module,
    placements: Sequence[Placement],
    quantizers: Mapping[str, FakeQuantizer],
    tensor_names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write an encodings file; see ``QuantSim.export_aimet_encodings``."""
    path = Path(path)
    if version not in LAYOUTS:
        raise EncodingsError(f"version is {version!r}; expected one of {', '.join(LAYOUTS)}")
    if path.is_dir():
        raise EncodingsError(f"{path}: is a folder; expected the path of a file")
    fields = _fields(version, model, placements, tensor_names)
    calibrated = {name: q for name, q in quantizers.items() if q.calibrated and not moves_with_tensors(q)}
    if not calibrated:
        raise EncodingsError(f"{path}: none of {len(quantizers)} quantizers has a range; call compute_encodings first")
    if estimating := [name for name, q in quantizers.items() if q.state is State.ESTIMATING]:
        raise EncodingsError(f"{path}: {estimating[0]} is being calibrated; expected calibration to be over")
    axes = _axes(placements)
    encodings: dict[str, Encoding] = {}
    for name, quantizer in calibrated.items():
        params = quantizer.affine_params()
        scale, zero_point = (x.detach().cpu().reshape(-1) for x in (params.scale, params.zero_point))  # [] or [C] -> [C]
        encoding = Encoding(quantizer.spec.bits, quantizer.spec.symmetric, scale, zero_point, axes[name])
        encodings |= dict.fromkeys(fields.of.get(name, ()), encoding)
    _write(path, json.dumps(LAYOUTS[version].dump(encodings), indent=1, allow_nan=False) + "\n")
    left_out = {name: DYNAMIC if moves_with_tensors(q) else NOT_CALIBRATED for name, q in quantizers.items() if name not in calibrated}
    left_out |= dict(fields.left_out)
    return {name: left_out[name] for name in quantizers if name in left_out}


def _write(path: Path, text: str) -> None:
    """The whole file, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=path.parent))
    try:
        (staging / path.name).write_text(text, encoding="utf-8")
        (staging / path.name).replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---- read ----


@torch.no_grad()
def load_aimet_encodings(
    path: str | Path,
    model: nn.Module,
    placements: Sequence[Placement],
    quantizers: Mapping[str, FakeQuantizer],
    strict: bool = True,
    tensor_names: Mapping[str, str] | None = None,
) -> LoadedEncodings:
    """Read an encodings file and give quantizers its ranges, all or none; see ``QuantSim.load_aimet_encodings``."""
    path = Path(path)
    file = read_json(path, EncodingsError)
    version = layout_of(file)
    encodings = dict(LAYOUTS[version].parse(file))
    fields = _fields(version, model, placements, tensor_names)
    known = {field for name in quantizers for field in fields.of.get(name, ())}
    unknown = tuple(field for field in encodings if field not in known)
    missing = tuple(name for name in quantizers if name in fields.of and not any(field in encodings for field in fields.of[name]))
    if strict and unknown:
        count = f"and {len(unknown) - 1} more belong" if len(unknown) > 1 else "belongs"
        nearest = near(unknown[0], known)
        raise EncodingsError(f"{path}: {unknown[0]} {count} to no quantizer here (nearest: {nearest}); strict=False skips what is unknown")
    if strict and missing:
        count = f"and {len(missing) - 1} more are" if len(missing) > 1 else "is"
        raise EncodingsError(f"{path}: {fields.of[missing[0]][0]} {count} missing; expected a range for every quantizer, or strict=False")
    ranges, inexact = _ranges(path, encodings, fields, quantizers, _axes(placements))
    for name, (low, high) in ranges.items():
        quantizers[name].set_range(low, high)
    return LoadedEncodings(tuple(ranges), missing, fields.left_out, unknown, inexact)


def _ranges(
    path: Path, encodings: Encodings, fields: Fields, quantizers: Mapping[str, FakeQuantizer], axes: Mapping[str, int | None]
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Every range that the file gives, checked against its quantizer, and whose scale is not to the bit the file's."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    inexact: dict[str, None] = {}
    for name, quantizer in quantizers.items():
        for field in (field for field in fields.of.get(name, ()) if field in encodings):
            found, exact = _range(path, field, encodings[field], quantizer, axes[name])
            if name in ranges and not all(torch.equal(a, b) for a, b in zip(ranges[name], found, strict=True)):
                raise EncodingsError(f"{path}: {field} is another range than {fields.of[name][0]}; expected the same, for {name} is both")
            ranges[name] = found
            if not exact:
                inexact[name] = None
    return ranges, tuple(inexact)


def _range(path: Path, field: str, encoding: Encoding, quantizer: FakeQuantizer, axis: int | None) -> tuple[tuple[Tensor, Tensor], bool]:
    """The quantizer's range for an encoding, and whether it gives the encoding's scale to the bit."""
    spec = quantizer.spec
    seen, wanted = (f"{x.bits}-bit {'symmetric' if x.symmetric else 'asymmetric'}" for x in (encoding.spec, spec))
    if seen != wanted:
        what = "bits" if encoding.bits != spec.bits else "symmetry"
        raise EncodingsError(f"{path}: {field} is {seen}; {what} of this quantizer: expected {wanted}")
    channels = quantizer.min.numel()
    if len(encoding.scale) != channels:
        per = "one range per tensor" if spec.axis is None else f"a range for each of {channels} channels (axis {axis})"
        raise EncodingsError(f"{path}: {field} has {len(encoding.scale)} ranges; expected {per}")
    if encoding.axis is not None and encoding.axis != axis:
        raise EncodingsError(f"{path}: {field} has axis {encoding.axis}; expected {'no axis' if axis is None else axis}")
    low, high = (end.to(quantizer.min.dtype) for end in exact_range(encoding.params, spec))
    given = affine_params(low, high, spec)
    if not torch.equal(given.zero_point, encoding.zero_point):
        raise EncodingsError(f"{path}: {field} cannot be held by a range in {low.dtype}; expected a scale that its zero point allows there")
    low, high = (end.reshape(quantizer.min.shape).to(quantizer.min.device) for end in (low, high))
    try:
        quantizer.check_range(low, high)
    except CalibrationError as error:
        raise EncodingsError(f"{path}: {field}: {error}") from error
    return (low, high), torch.equal(given.scale, encoding.scale)


# ---- which quantizer is which field ----


def _fields(version: str, model: nn.Module, placements: Sequence[Placement], tensor_names: Mapping[str, str] | None) -> Fields:
    """Those of the layout; groups have none."""
    found = _all_fields(version, model, placements, tensor_names)
    grouped = {p.name: GROUPS for p in placements if p.spec is not None and p.spec.groups is not None}
    of = {name: fields for name, fields in found.of.items() if name not in grouped}
    return Fields(of, {**found.left_out, **grouped})


def _all_fields(version: str, model: nn.Module, placements: Sequence[Placement], tensor_names: Mapping[str, str] | None) -> Fields:
    placed = {p.name: p for p in placements if p.spec is not None}
    if version == "torch" and (scaled := [p.name for p in placements if p.reason == UNSCALED]):
        raise EncodingsError(
            f"post_training.smooth: this model multiplies by {scaled[0]} ({len(scaled)} such products), and the model that such a file is "
            "for does not. Write export_onnx(quantize=False) and its encodings (version='2.0.0'), or calibrate without smooth"
        )
    if version == "torch":
        if tensor_names:
            raise EncodingsError("tensor_names: the torch-side file has modules and parameters, no tensors; expected none")
        return _torch_fields(model, placements, placed)
    tensor_names = tensor_names or {}
    for name in tensor_names:
        if name not in placed:
            raise EncodingsError(f"tensor_names: {name!r} has no quantizer (nearest: {near(name, placed)})")
    of: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name, p in placed.items():
        tensor = tensor_names.get(name, name)
        if tensor in owner:
            raise EncodingsError(f"tensor_names: {tensor!r} stands for {owner[tensor]} and for {name}; expected a tensor for each")
        owner[tensor] = name
        section = ALL if version == "2.0.0" else PARAMS if p.role == "weight" else ACTIVATIONS
        of[name] = (f"{section}.{tensor}",)
    return Fields(of, {})


def _torch_fields(model: nn.Module, placements: Sequence[Placement], placed: Mapping[str, Placement]) -> Fields:
    """A weight by its parameter's names; a module's output by the module; the sum, product, quotient or concatenation of tensors,
    and an input of the model, by the modules that take it as it is, as their input. Other edges have no field."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    outputs = {p.node: p.name.removesuffix(".output") for p in placements if p.edge == "output" and p.name.endswith(".output")}
    again = {later[1] for p in placements if p.edge == "output" and (later := LATER_CALL.fullmatch(p.name))}
    of: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, str] = {}
    for name, p in placed.items():
        if p.role == "weight":
            own = parameters.get(name)
            tied = [other for other, parameter in parameters.items() if own is not None and parameter is own and other != name]
            of[name] = tuple(f"{PARAMS}.{parameter}" for parameter in (name, *tied))
        elif LATER_CALL.fullmatch(name) or outputs.get(p.node) in again:
            left_out[name] = CALLED_TWICE
        elif p.node in outputs:
            of[name] = (f"{ACTIVATIONS}.{outputs[p.node]}.output.0",)
        elif (p.op in AS_INPUTS or p.role == "input") and (inputs := _as_inputs(p.node, outputs, again)):
            of[name] = inputs
        else:
            left_out[name] = NO_MODULE
    return Fields(of, left_out)


def _as_inputs(node: fx.Node, modules: Mapping[fx.Node, str], again: set[str]) -> tuple[str, ...]:
    readers = [modules[user] for value, user in _readers(node) if user in modules and user.args and user.args[0] is value]
    return tuple(dict.fromkeys(f"{ACTIVATIONS}.{module}.input.0" for module in readers if module not in again))


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that read an edge, past its quantizer, each with the node that it reads."""
    for user in node.users:
        if user.op == "call_module" and str(user.target).startswith(RANGES):
            yield from ((user, reader) for reader in user.users)
        else:
            yield node, user


def _axes(placements: Sequence[Placement]) -> dict[str, int | None]:
    """The axis of each quantizer's channels, counted from the front."""
    axes: dict[str, int | None] = {}
    for p in placements:
        if p.spec is None:
            continue
        node = p.node.args[int(p.edge)] if p.role == "weight" and p.edge != "output" else p.node
        assert isinstance(node, fx.Node)
        axes[p.name] = None if p.spec.axis is None else p.spec.axis % node.meta["val"].ndim
    return axes
