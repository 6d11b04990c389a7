"""AIMET's four encodings layouts: an :class:`Encoding` by field ↔ the JSON of a version. Its string booleans and offsets end here.

Sources: what aimet-torch 2.42 writes and reads (``save_encodings_to_json``, ``load_encodings``), and its documented encodings
formats 0.6.1, 1.0.0 and 2.0.0.

AIMET's ``offset`` is ``quant_min - zero_point``: minus the zero point where the grid starts at 0, and ``-2**(bits-1)`` where it is
symmetric. Format 2.0.0 alone has a zero point, ``y_zero_point``, and it is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from quantsim.config import MAX_BITS, MIN_BITS, QuantSpec
from quantsim.formats.json_field import JsonField
from quantsim.numerics.affine import AffineParams
from quantsim.numerics.exact_range import exact_range

ACTIVATIONS, PARAMS, ALL = "activation_encodings", "param_encodings", "encodings"
ABOUT = ("producer", "version", "excluded_layers", "quantizer_args")
BOOLEANS = {"True": True, "False": False}
WIDTH_TOLERANCE = 1e-4  # relative: what writers that compute in float32 or print few digits differ by


@dataclass(frozen=True, eq=False)
class Encoding:
    """How one tensor is quantized.

    Attributes:
        bits, symmetric: its grid, as in :class:`QuantSpec`.
        scale, zero_point: ``[C]``, with ``C == 1`` for one range per tensor; float32.
        axis: the axis that keeps ranges of its own, ``None`` for one per tensor or where a layout doesn't say.
    """

    bits: int
    symmetric: bool
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, symmetric=self.symmetric)

    @property
    def params(self) -> AffineParams:
        return AffineParams(self.scale, self.zero_point, self.spec.quant_min, self.spec.quant_max)

    @property
    def offsets(self) -> list[int]:
        return [self.spec.quant_min - int(zero_point) for zero_point in self.zero_point.tolist()]


Encodings = Mapping[str, Encoding]
"""By field, as messages name it: ``param_encodings.<parameter>``, ``activation_encodings.<module>.output.0`` in the torch-side file;
``param_encodings.<tensor>``, ``activation_encodings.<tensor>`` in 0.6.1 and 1.0.0; ``encodings.<tensor>`` in 2.0.0."""


@dataclass(frozen=True)
class Layout:
    """One version: how it is written, and how it is read."""

    dump: Callable[[Encodings], dict[str, Any]]
    parse: Callable[[JsonField], Iterator[tuple[str, Encoding]]]


def layout_of(file: JsonField) -> str:
    """Which of :data:`LAYOUTS` a file has. AIMET's exported torch-side file may carry an ONNX-side version: its sections tell."""
    file.only((), (*ABOUT, ACTIVATIONS, PARAMS, ALL))
    version = file.get("version")
    if version.value is not None:
        version.one_of(*(name for name in LAYOUTS if name != "torch"))
    if ALL in file.value or version.value == "2.0.0":
        file.only(("version", ALL), ABOUT)
        return str(version.one_of("2.0.0"))
    activations, params = (file.value.get(section) for section in (ACTIVATIONS, PARAMS))
    if activations is None and params is None:
        raise file.refuse(f"an object with {ACTIVATIONS} and {PARAMS}, or with {ALL}")
    if isinstance(activations, list) or isinstance(params, list):
        return str(version.one_of("1.0.0"))
    by_module = isinstance(activations, dict) and any(isinstance(entry, dict) for entry in activations.values())
    return "0.6.1" if version.value == "0.6.1" and not by_module else "torch"


# ---- bodies in lists: torch-side and 0.6.1 ----


def _bodies(encoding: Encoding) -> list[dict[str, Any]]:
    low, high = exact_range(encoding.params, encoding.spec, by_width=True)  # AIMET's scale is (max - min) / steps on every grid
    rows = zip(low.tolist(), high.tolist(), encoding.scale.tolist(), encoding.offsets, strict=True)
    return [
        {
            "bitwidth": encoding.bits,
            "dtype": "int",
            "is_symmetric": str(encoding.symmetric),
            "max": maximum,
            "min": minimum,
            "offset": offset,
            "scale": scale,
        }
        for minimum, maximum, scale, offset in rows
    ]


def _from_bodies(field: JsonField) -> Encoding:
    bodies = field.elements() if isinstance(field.value, list) else [field]
    read = [_from_body(body) for body in bodies]
    for body, encoding in zip(bodies, read, strict=True):
        body.get("bitwidth").one_of(read[0].bits)
        if encoding.symmetric != read[0].symmetric:
            raise body.get("is_symmetric").refuse(f'"{read[0].symmetric}", as in the channel before')
    scale, zero_point = (torch.cat([getattr(encoding, name) for encoding in read]) for name in ("scale", "zero_point"))
    return Encoding(read[0].bits, read[0].symmetric, scale, zero_point)


def _from_body(body: JsonField) -> Encoding:
    """AIMET reads ``min``, ``max``, ``bitwidth`` and ``is_symmetric``; ``scale`` and ``offset``, where they are, must agree with them.

    They then count, for ``min`` and ``max`` are rounded and give the scale back to its last bit or two only.
    """
    body.only(("min", "max", "bitwidth", "is_symmetric"), ("dtype", "scale", "offset"))
    body.get("dtype", "int").one_of("int")
    spec = QuantSpec(bits=body.get("bitwidth").whole(MIN_BITS, MAX_BITS), symmetric=_boolean(body.get("is_symmetric")))
    low, high = body.get("min").number(), body.get("max").number()
    if low > high:
        raise body.get("min").refuse(f"at most max, which is {high!r}")
    if not low <= 0 <= high:
        raise body.get("min" if low > 0 else "max").refuse("a range that holds 0")
    steps = spec.quant_max - spec.quant_min
    scale = (high - low) / steps
    if "scale" in body.value:
        given = body.get("scale").number(above=0)
        if abs(given - scale) > WIDTH_TOLERANCE * given:
            raise body.get("scale").refuse(f"(max - min) / {steps}, which is {scale!r}")
        scale = given
    offset = spec.quant_min if spec.symmetric or scale == 0 else round(low / scale)
    if "offset" in body.value:
        given_offset = _offset(body.get("offset"), spec)
        if not spec.symmetric and scale > 0 and abs(low / scale - given_offset) > 0.5 + WIDTH_TOLERANCE * steps:
            raise body.get("offset").refuse(f"min / scale to the nearest integer, which is {offset}")
        offset = given_offset
    return _encoding(body, spec, [scale], [spec.quant_min - offset])


def _dump_torch(encodings: Encodings) -> dict[str, Any]:
    activations: dict[str, dict[str, dict[str, Any]]] = {}
    params: dict[str, Any] = {}
    for field, encoding in encodings.items():
        section, name = field.split(".", 1)
        bodies = _bodies(encoding)
        if section == PARAMS:
            params[name] = bodies
        else:
            module, kind, index = name.rsplit(".", 2)
            activations.setdefault(module, {}).setdefault(kind, {})[index] = bodies[0] if len(bodies) == 1 else bodies
    return {ACTIVATIONS: activations, PARAMS: params}


def _parse_torch(file: JsonField) -> Iterator[tuple[str, Encoding]]:
    for _, module in file.get(ACTIVATIONS, {}).items():
        for _, kind in module.only((), ("input", "output")).items():
            for _, entry in kind.items():
                yield entry.name, _from_bodies(entry)
    for _, entry in file.get(PARAMS, {}).items():
        entry.elements()
        yield entry.name, _from_bodies(entry)


def _dump_0_6_1(encodings: Encodings) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {ACTIVATIONS: {}, PARAMS: {}}
    for field, encoding in encodings.items():
        section, name = field.split(".", 1)
        sections[section][name] = _bodies(encoding)
    return _header("0.6.1") | sections


def _parse_0_6_1(file: JsonField) -> Iterator[tuple[str, Encoding]]:
    for section in (ACTIVATIONS, PARAMS):
        for _, entry in file.get(section, {}).items():
            entry.elements()
            yield entry.name, _from_bodies(entry)


# ---- named entries: 1.0.0 and 2.0.0 ----


def _dump_1_0_0(encodings: Encodings) -> dict[str, Any]:
    sections: dict[str, list[dict[str, Any]]] = {ACTIVATIONS: [], PARAMS: []}
    for field, encoding in encodings.items():
        section, name = field.split(".", 1)
        entry = {
            "name": name,
            "dtype": "INT",
            "bw": encoding.bits,
            "is_sym": encoding.symmetric,
            "scale": encoding.scale.tolist(),
            "offset": encoding.offsets,
            "enc_type": "PER_TENSOR" if encoding.axis is None else "PER_CHANNEL",
        }
        sections[section].append(entry)
    return _header("1.0.0") | sections


def _parse_1_0_0(file: JsonField) -> Iterator[tuple[str, Encoding]]:
    for section in (ACTIVATIONS, PARAMS):
        for entry in _entries(file.get(section, [])):
            entry.only(("name", "dtype", "bw", "is_sym", "scale", "offset", "enc_type"))
            entry.get("dtype").one_of("INT")
            spec = QuantSpec(bits=entry.get("bw").whole(MIN_BITS, MAX_BITS), symmetric=entry.get("is_sym").one_of(True, False))
            scale = [x.number(above=0) for x in entry.get("scale").elements()]
            offset = [_offset(x, spec) for x in entry.get("offset").elements()]
            if len(offset) != len(scale):
                raise entry.get("offset").refuse(f"as many as scale has: {len(scale)}")
            if entry.get("enc_type").one_of("PER_TENSOR", "PER_CHANNEL") == "PER_TENSOR" and len(scale) > 1:
                raise entry.get("scale").refuse("one value, for enc_type is PER_TENSOR")
            yield entry.name, _encoding(entry, spec, scale, [spec.quant_min - x for x in offset])


def _dump_2_0_0(encodings: Encodings) -> dict[str, Any]:
    entries = []
    for field, encoding in encodings.items():
        per_tensor = encoding.axis is None
        scale, zero_point = encoding.scale.tolist(), [int(x) for x in encoding.zero_point.tolist()]
        entry = {
            "name": field.split(".", 1)[1],
            "output_dtype": f"{'int' if encoding.symmetric else 'uint'}{encoding.bits}",
            "y_scale": scale[0] if per_tensor else scale,
        }
        if any(zero_point):
            entry["y_zero_point"] = zero_point[0] if per_tensor else zero_point
        entries.append(entry if per_tensor else entry | {"axis": encoding.axis})
    return _header("2.0.0") | {ALL: entries}


def _parse_2_0_0(file: JsonField) -> Iterator[tuple[str, Encoding]]:
    dtypes = [f"{sign}{bits}" for bits in range(MIN_BITS, MAX_BITS + 1) for sign in ("int", "uint")]
    for entry in _entries(file.get(ALL)):
        entry.only(("name", "output_dtype", "y_scale"), ("y_zero_point", "axis"))
        dtype = entry.get("output_dtype")
        if dtype.value not in dtypes:
            raise dtype.refuse(f"int or uint and {MIN_BITS} to {MAX_BITS} bits")
        symmetric = dtype.value.startswith("int")
        spec = QuantSpec(bits=int(dtype.value.removeprefix("u").removeprefix("int")), symmetric=symmetric)
        axis = entry.get("axis").whole(0, 1 << 10) if "axis" in entry.value else None
        scale = [x.number(above=0) for x in _values(entry.get("y_scale"), axis)]
        zero_point = [0] * len(scale)
        if "y_zero_point" in entry.value:
            highest = 0 if symmetric else spec.quant_max
            zero_point = [x.whole(0, highest) for x in _values(entry.get("y_zero_point"), axis)]
        if len(zero_point) != len(scale):
            raise entry.get("y_zero_point").refuse(f"as many as y_scale has: {len(scale)}")
        yield entry.name, _encoding(entry, spec, scale, zero_point, axis)


def _values(field: JsonField, axis: int | None) -> list[JsonField]:
    """A number, or with an axis a list of them."""
    if axis is None and isinstance(field.value, list):
        raise field.refuse("a number, for there is no axis")
    return [field] if axis is None else field.elements()


def _entries(section: JsonField) -> Iterator[JsonField]:
    """A list's objects, each under its own name in place of its index."""
    if not isinstance(section.value, list):
        raise section.refuse("a list")
    seen: set[str] = set()
    for index, value in enumerate(section.value):
        at = JsonField(section.path, f"{section.name}.{index}", value, section.error)
        at.only(("name",), tuple(value) if isinstance(value, dict) else ())
        name = at.get("name").text()
        if name in seen:
            raise at.get("name").refuse("each name once")
        seen.add(name)
        yield JsonField(section.path, f"{section.name}.{name}", value, section.error)


# ---- shared ----


def _header(version: str) -> dict[str, Any]:
    return {"version": version, "producer": {"package": "quantsim", "version": metadata.version("quantsim")}}


def _boolean(field: JsonField) -> bool:
    return BOOLEANS[field.one_of(*BOOLEANS)]


def _offset(field: JsonField, spec: QuantSpec) -> int:
    return field.whole(spec.quant_min if spec.symmetric else -spec.quant_max, spec.quant_min)


def _encoding(field: JsonField, spec: QuantSpec, scale: list[float], zero_point: list[int], axis: int | None = None) -> Encoding:
    scales, zero_points = torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.float32)
    if not (scales * (spec.quant_max - spec.quant_min)).isfinite().all():
        raise field.refuse("a range that float32 can hold")
    return Encoding(spec.bits, spec.symmetric, scales, zero_points, axis)


LAYOUTS = {
    "torch": Layout(_dump_torch, _parse_torch),
    "0.6.1": Layout(_dump_0_6_1, _parse_0_6_1),
    "1.0.0": Layout(_dump_1_0_0, _parse_1_0_0),
    "2.0.0": Layout(_dump_2_0_0, _parse_2_0_0),
}
