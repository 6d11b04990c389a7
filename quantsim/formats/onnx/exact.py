"""Ops whose result is the simulation's to the bit in any runtime that follows ONNX.

What differs from one library to the next is written in another way, in standard operators::

    linear            MatMul(DQ(x), DQ(w)) + b             one form for every rank; runtimes sum its integers
    linear(rows of x) MatMul(DQ(Q(rows)), DQ(w)) + b       runtimes look for a DQ right before a product; rows are on the grid
    f(8-bit edge)     Gather(table, q)                      exp, erf and tanh of libraries differ in the last bit
    softmax           e = Gather(table, max(q) - q);  e / float32(sum of e in float64)
    LayerNorm         in float64, its result cast to float32
    x + y             Sum(x, y)                             runtimes make DQ → Add → Q one op, which multiplies where Q divides
    matmul(x, y)      Sum(MatMul(x, y))                     the same; a Sum of one is the identity
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from quantsim.formats.onnx.edges import StoredEdge
from quantsim.formats.onnx.markers import DOMAIN, PLACEMENT, replace, source
from quantsim.graph.roles import op_of
from quantsim.kernels.edges import FUNCTIONS, Grid
from quantsim.numerics.reproducible import exp_table, layer_norm
from quantsim.quantizers.exact_linear import ExactLinear
from quantsim.quantizers.exact_op import ExactOp, fits
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of

if TYPE_CHECKING:
    import onnx_ir as ir

LOOK_UP, SOFTMAX, AGAIN = "LookUp", "Softmax", "Again"
RUNTIMES_SEE_THROUGH = frozenset(
    "clone contiguous dropout permute reshape squeeze t transpose unsafe_view unsqueeze view _unsafe_view".split()
)
DOUBLE = 11  # onnx.TensorProto.DOUBLE

aten = torch.ops.aten


# ---- in the marked graph ----


def look_up(x: Tensor, table: Tensor, placement: str) -> Tensor:
    """A marker: ``table[q - quant_min]`` of the integers ``q`` of an edge."""
    return _symbol(LOOK_UP, x, table, placement=placement)


def softmax(x: Tensor, table: Tensor, placement: str) -> Tensor:
    """A marker: softmax over the last axis of an edge, with ``table[i]`` for ``exp(-i * scale)``."""
    return _symbol(SOFTMAX, x, table, placement=placement)


def again(x: Tensor, placement: str) -> Tensor:
    """A marker: values of an edge that were moved are quantized again, which changes none."""
    return _symbol(AGAIN, x, placement=placement)


def _symbol(op: str, *inputs: Tensor, placement: str) -> Tensor:
    x = inputs[0]
    marked: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", inputs, {PLACEMENT: placement}, dtype=x.dtype, shape=x.shape, version=1)
    return marked


def exactly(new: fx.Graph, node: fx.Node, graph: fx.GraphModule, args: tuple[Any, ...], constants: dict[str, Any]) -> fx.Node | None:
    """The node's op in a form that is exact everywhere, made in ``new``; ``None`` if it has none, or needs none.

    Args:
        args: the node's, of ``new``.
        constants: tables are added to it, by the name of a ``get_attr``.
    """
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, ExactOp) and not all(quantizer.calibrated for quantizer in module.quantizers):
        return None
    if isinstance(module, ExactLinear):
        x = args[0] if _is_next_to(node.args[0], graph) else new.call_function(again, (args[0], module.quantizers[0].name))
        product = new.call_function(aten.matmul.default, (x, new.call_function(aten.t.default, (args[1],))))
        return product if len(args) < 3 or args[2] is None else new.call_function(aten.add.Tensor, (product, args[2]))
    if isinstance(module, ExactNorm):
        return new.call_function(layer_norm, args[:5])
    if isinstance(module, ExactSoftmax) and fits(quantizer := module.quantizers[0]):
        return _with_table(new, softmax, args[0], quantizer, exp_table(quantizer.affine_params().scale.item()), constants)
    if op_of(node, graph) not in FUNCTIONS or len(node.all_input_nodes) != 1:
        return None
    before = quantizer_before_moves(node.args[0], graph)
    if before is None or not before.calibrated or not fits(before) or before.spec.follow == "dynamic":
        return None
    return _with_table(new, look_up, args[0], before, _function_table(node, Grid.of(before.affine_params())), constants)


def _is_next_to(x: Any, graph: fx.GraphModule) -> bool:
    """The quantizer on whose grid ``x`` lies is right before it, or before ops that runtimes move a DequantizeLinear past."""
    while quantizer_of(x, graph) is None:
        if op_of(x, graph) not in RUNTIMES_SEE_THROUGH:
            return False
        x = x.args[0]
    return True


def _with_table(new: fx.Graph, marker: Any, x: fx.Node, quantizer: FakeQuantizer, table: Tensor, constants: dict[str, Any]) -> fx.Node:
    name = f"tables.{len(constants)}"
    constants[name] = table
    return new.call_function(marker, (x, new.get_attr(name), quantizer.name))


def _function_table(node: fx.Node, grid: Grid) -> Tensor:
    """The function of each of the grid's values, by the op that the simulation runs."""
    assert callable(node.target)
    table: Tensor = node.target(grid.values(), *node.args[1:], **node.kwargs)
    return table


# ---- in the file ----


def insert_exact(model: ir.Model, edges: Mapping[str, StoredEdge]) -> None:
    """Put standard operators in place of the markers, and keep runtimes from making one op of what is between two edges."""
    for marker, edge in list(_markers(model)):
        writer = _Writer(model, marker, edge, edges[edge])
        {SOFTMAX: writer.write_softmax, LOOK_UP: writer.write_look_up, AGAIN: writer.write_again}[marker.op_type]()
    for node in list(model.graph):
        if node.op_type == "LayerNormalization" and node.outputs[0].dtype == DOUBLE:
            _sum_in_float64(node)
        elif node.op_type == "QuantizeLinear":
            _keep_apart(model, node)
        elif node.op_type == "Add" and _is_bias_of_a_matrix(node):
            node.op_type = "Sum"  # MatMul and Add of matrices become a Gemm, which runtimes leave in floating point


def _markers(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in (LOOK_UP, SOFTMAX, AGAIN):
            yield node, node.attributes[PLACEMENT].as_string()


def _is_bias_of_a_matrix(add: ir.Node) -> bool:
    product, shape = source(add).producer(), add.outputs[0].shape
    return product is not None and product.op_type == "MatMul" and shape is not None and len(shape) == 2


def _sum_in_float64(norm: ir.Node) -> None:
    import onnx_ir as ir

    norm.attributes["stash_type"] = ir.AttrInt64("stash_type", DOUBLE)


def _keep_apart(model: ir.Model, quantize: ir.Node) -> None:
    """An op between edges, and no constant in it, is what runtimes take together with the quantizers around it."""
    import onnx_ir as ir

    x = source(quantize)
    node = x.producer()
    if (
        node is None
        or node.op_type not in ("Add", "MatMul", "Mul", "Sub", "Where")
        or any(y is None or y.is_initializer() for y in node.inputs)
    ):
        return
    if node.op_type == "Add":
        node.op_type = "Sum"
        return
    apart = ir.Node("", "Sum", [x], name=f"{x.name}.apart")
    out = apart.outputs[0]
    out.name, out.shape, out.dtype = f"{x.name}.apart", x.shape, x.dtype
    model.graph.insert_before(quantize, apart)
    quantize.replace_input_with(0, out)


class _Writer:
    """Writes what stands for one marker."""

    def __init__(self, model: ir.Model, marker: ir.Node, name: str, edge: StoredEdge) -> None:
        self.graph, self.marker, self.name, self.edge = model.graph, marker, name, edge

    def write_look_up(self) -> None:
        table = self._table()
        if not self.edge.type.startswith("U"):  # an index of -1 is the last entry
            assert self.edge.params is not None
            table = table.roll(self.edge.params.quant_min)
        index = self._int32()
        self._finish(self._node("Gather", [self._constant("table", table), index], 1, "looked_up"))

    def write_again(self) -> None:
        self._finish(self._node("DequantizeLinear", [self._quantized(), *self._grid()], 1, "dequantized"))

    def write_softmax(self) -> None:
        q, last = self._int32(), self._constant("last_axis", torch.tensor([-1]))
        largest = self._node("ReduceMax", [q, last], 6, "largest")
        below = self._node("Sub", [largest, q], 6, "below")
        e = self._node("Gather", [self._constant("exps", self._table()), below], 1, "exp")
        wide = self._node("Cast", [e], DOUBLE, "exp_float64", to=DOUBLE)
        total = self._node("Cast", [self._node("ReduceSum", [wide, last], DOUBLE, "sum_float64")], 1, "sum", to=1)
        self._finish(self._node("Div", [e, total], 1, "softmax"))

    def _finish(self, value: ir.Value) -> None:
        value.shape = self.marker.outputs[0].shape
        replace(self.marker, value)

    def _table(self) -> Tensor:
        table = self.marker.inputs[1]
        assert table is not None
        assert table.const_value is not None
        return torch.from_numpy(table.const_value.numpy().copy())

    def _int32(self) -> ir.Value:
        """The edge's integers: those that its DequantizeLinear reads, or quantized again where values were moved since."""
        x = source(self.marker)
        before = x.producer()
        if before is not None and before.op_type == "DequantizeLinear":
            return self._node("Cast", [before.inputs[0]], 6, "int32", to=6)
        return self._node("Cast", [self._quantized()], 6, "int32", to=6)

    def _quantized(self) -> ir.Value:
        dtype = self._grid()[1].dtype
        assert dtype is not None
        return self._node("QuantizeLinear", [source(self.marker), *self._grid()], dtype.value, "quantized")

    def _grid(self) -> list[ir.Value]:
        return [self.graph.initializers[f"{self.name}.{what}"] for what in ("scale", "zero_point")]

    def _constant(self, what: str, value: Tensor) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(value.numpy(), name=f"{self.marker.name}.{what}")
        made = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _node(self, op: str, inputs: list[Any], dtype: int, what: str, **attributes: int) -> ir.Value:
        import onnx_ir as ir

        made = ir.Node("", op, inputs, attributes=[ir.AttrInt64(k, v) for k, v in attributes.items()], name=f"{self.marker.name}.{what}")
        out = made.outputs[0]
        out.name, out.dtype = f"{self.marker.name}.{what}", ir.DataType(dtype)
        self.graph.insert_before(self.marker, made)
        return out
