"""What an ONNX file holds for each edge of a simulation: its grid, and the integer type that stores it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx

from quantsim.formats.onnx.extra import OnnxError
from quantsim.graph.roles import WEIGHTS, op_of, resolve
from quantsim.numerics.affine import AffineParams, quantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State, WeightQuantizer
from quantsim.quantizers.following import moves_with_tensors
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of

Bias = Literal["float", "int32"]

LOWEST_OPSET, USUAL_OPSET, SMALL_TYPES_OPSET = 18, 20, 21
PRODUCTS = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d"})
INT32 = 2**31 - 1


class StoredEdge(NamedTuple):
    """One edge as it is stored.

    Attributes:
        params: scale, zero point and ends of its grid; ``None`` for a quantizer that is off.
        is_weight: a constant, stored as integers.
    """

    params: AffineParams | None
    is_weight: bool

    @property
    def type(self) -> str:
        """The smallest of ONNX's integer types that holds the grid: ``"INT8"``, ``"UINT16"``, …; 4 bits for weights alone.

        No runtime computes on activations of 4 bits, and ONNX Runtime 1.32 refuses a Clip before them.
        """
        assert self.params is not None
        signed = self.params.quant_min < 0
        sizes = (4, 8, 16, 32) if self.is_weight else (8, 16)
        bits = next(bits for bits in sizes if self.params.quant_max < 2 ** (bits - signed))
        return f"{'' if signed else 'U'}INT{bits}"

    @property
    def fills_type(self) -> bool:
        """The grid ends where the type does, so that saturation clamps to it."""
        assert self.params is not None
        bits = int(self.type.removeprefix("U").removeprefix("INT"))
        return self.params.quant_max - self.params.quant_min == (1 << bits) - 1


def stored_unsigned(edges: Mapping[str, StoredEdge], opset: int, exact: bool) -> dict[str, StoredEdge]:
    """Edges of an INT8 grid shifted to UINT8 where that computes more surely: the same values, every integer higher by as much
    (weights by 128).

    Activations from opset 21 on: ONNX Runtime 1.32 refuses INT8 ones there, for its QDQ propagation gives a node an
    ``output_dtype`` that its own type check denies (onnxruntime issue 25526). In an exact file all of them, weights too: on an
    x86 CPU without VNNI ONNX Runtime adds pairs of ``uint8 × int8`` products in 16 bits, which saturate in silence, and
    ``uint8 × uint8`` ones in 32.
    """
    return {
        name: StoredEdge(_higher(edge.params, 128 if edge.is_weight else -edge.params.quant_min), edge.is_weight)
        if edge.params and edge.type == "INT8" and (exact or (opset >= SMALL_TYPES_OPSET and not edge.is_weight))
        else edge
        for name, edge in edges.items()
    }


def _higher(params: AffineParams, by: int) -> AffineParams:
    return replace(params, zero_point=params.zero_point + by, quant_min=params.quant_min + by, quant_max=params.quant_max + by)


def integers_of(x: Tensor, params: AffineParams) -> Tensor:
    """``q`` of a constant, as int32; a bias in 32 bits is divided in float64, whose integers go that far."""
    if params.quant_max == INT32:
        return quantize(x.double(), replace(params, scale=params.scale.double()))
    return quantize(x, params)


# ---- weights and activations ----


def stored_edges(graph: fx.GraphModule) -> dict[str, StoredEdge]:
    """Every quantizer's edge by its placement's name.

    Raises:
        OnnxError: no quantizer, none calibrated, or one amid calibration.
    """
    edges: dict[str, StoredEdge] = {}
    for _, quantizer in quantizer_calls(graph):
        if quantizer.state is State.ESTIMATING:
            raise OnnxError(f"{quantizer.name}: state ESTIMATING; expected calibration to be finished")
        if moves_with_tensors(quantizer):
            raise OnnxError(
                f"{quantizer.name}: its range is each tensor's own (dynamic), and QDQ holds one that is known; calibrate with a static "
                "config, or lower() it"
            )
        with torch.no_grad():
            params = quantizer.affine_params() if quantizer.calibrated else None
        edges[quantizer.name] = StoredEdge(params, isinstance(quantizer, WeightQuantizer))
    if not any(edge.params for edge in edges.values()):
        what = "none of its quantizers is calibrated" if edges else "its config places no quantizer"
        raise OnnxError(f"nothing to quantize: {what}. Call compute_encodings first, or write the FP32 model with quantize=False")
    return edges


def quantizer_calls(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, FakeQuantizer]]:
    for node in graph.graph.find_nodes(op="call_module"):
        if (quantizer := quantizer_of(node, graph)) is not None:
            yield node, quantizer


def check_opset(opset: int | None, edges: Mapping[str, StoredEdge]) -> int:
    """The opset to write: 20, or 21 where a type of 4 or 16 bits needs it.

    Raises:
        OnnxError: the one that was asked for is too low.
    """
    small = {name: edge.type for name, edge in edges.items() if edge.params and edge.type.removeprefix("U") in ("INT4", "INT16")}
    if opset is None:
        return SMALL_TYPES_OPSET if small else USUAL_OPSET
    if opset < LOWEST_OPSET:
        raise OnnxError(f"opset {opset}; expected {LOWEST_OPSET} or more, as torch.onnx has operators for")
    if small and opset < SMALL_TYPES_OPSET:
        name, kind = next(iter(small.items()))
        raise OnnxError(f"opset {opset}: {name} is stored as {kind}, which QuantizeLinear takes from opset {SMALL_TYPES_OPSET} on")
    return opset


# ---- biases ----


def int32_biases(graph: fx.GraphModule) -> tuple[dict[fx.Node, str], dict[str, StoredEdge]]:
    """The biases that an integer product can add to its sums: those of linears and convolutions with input and weight on a grid.

    ``scale = scale_x * scale_w``, zero point 0, 32 bits. A bias that these cannot hold stays in floating point, with a warning.

    Returns:
        The node that takes each bias → its name; and name → how it is stored.
    """
    names: dict[fx.Node, str] = {}
    edges: dict[str, StoredEdge] = {}
    for node in graph.graph.nodes:
        op = op_of(node, graph)
        if op not in PRODUCTS or (bias := _bias(node, op)) is None:
            continue
        params = _bias_params(graph, node, op)
        if params is None:
            continue
        value = resolve(graph, str(bias.target))
        assert isinstance(value, Tensor)
        if (value.detach().double() / params.scale.double()).abs().max() > INT32:
            warnings.warn(
                f"{bias.target}: does not fit in 32 bits at scale_x * scale_w (smallest {params.scale.min().item():.3g}); left in float",
                stacklevel=2,
            )
            continue
        name = str(bias.target)
        names[node] = name if name not in edges else f"{name}_{sum(key.startswith(name) for key in edges)}"
        edges[names[node]] = StoredEdge(params, True)
    return names, edges


def bias_at(op: str) -> int:
    """Which argument of the op is its bias."""
    at = WEIGHTS[op].bias
    assert at is not None
    return at


def _bias(node: fx.Node, op: str) -> fx.Node | None:
    bias = node.args[bias_at(op)] if len(node.args) > bias_at(op) else None
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _bias_params(graph: fx.GraphModule, node: fx.Node, op: str) -> AffineParams | None:
    at = WEIGHTS[op]
    x, weight = node.args[1 if op == "addmm" else 0], node.args[at.index]
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
        return None
    before, own = _grid_of(graph, x), quantizer_of(weight, graph)
    if before is None or own is None or not own.calibrated or before.axis is not None:
        return None
    with torch.no_grad():
        params = own.affine_params()
    if params.axis is not None and params.axis % weight.meta["val"].ndim != at.axis:
        return None
    scale = before.scale * params.scale
    return AffineParams(scale, torch.zeros_like(scale), -INT32 - 1, INT32, None if scale.ndim == 0 else 0)


def _grid_of(graph: fx.GraphModule, node: fx.Node) -> AffineParams | None:
    """The grid that the node's values are on, if they are on one."""
    quantizer = quantizer_before_moves(node, graph)
    with torch.no_grad():
        return quantizer.affine_params() if quantizer is not None and quantizer.calibrated else None
