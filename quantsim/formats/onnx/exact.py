"""Ops whose result is the simulation's to the bit in any runtime that follows ONNX.

What differs from one library to the next is written in another way, in standard operators::

    linear            MatMul(DQ(x), DQ(w)) + b              one form for every rank; runtimes sum its integers
    linear(rows of x) MatMul(DQ(Q(rows)), DQ(w)) + b        runtimes look for a DQ right before a product; rows are on the grid
    f(8-bit edge)     table[q]                              exp, erf and tanh of libraries differ in the last bit
    softmax           e = table[max(q) - q];  e / float32(sum of e in float64)
    LayerNorm         operator by operator, its two sums in float64
    x + y             Sum(x, y)                             runtimes make DQ → Add → Q one op, which multiplies where Q divides
    matmul(x, y)      Sum(MatMul(x, y))                     the same; a Sum of one is the identity
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from quantsim.formats.onnx.edges import StoredEdge
from quantsim.formats.onnx.markers import DOMAIN, PLACEMENT, replace, source
from quantsim.graph.roles import op_of
from quantsim.kernels.edges import FUNCTIONS, Grid
from quantsim.numerics.reproducible import exp_table
from quantsim.quantizers.exact_linear import ExactLinear
from quantsim.quantizers.exact_matmul import ExactMatmul
from quantsim.quantizers.exact_op import ExactOp, fits
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of

if TYPE_CHECKING:
    import onnx_ir as ir

LOOK_UP, SOFTMAX, NORM, AGAIN = "LookUp", "Softmax", "Norm", "Again"
RUNTIMES_SEE_THROUGH = frozenset(
    "clone contiguous dropout permute reshape squeeze t transpose unsafe_view unsqueeze view _unsafe_view".split()
)
FLOAT, INT32, INT64, DOUBLE = 1, 6, 7, 11  # onnx.TensorProto

aten = torch.ops.aten


# ---- in the marked graph ----


def look_up(x: Tensor, table: Tensor, placement: str) -> Tensor:
    """A marker: ``table[q - quant_min]`` of the integers ``q`` of an edge."""
    return _symbol(LOOK_UP, x, table, placement=placement)


def softmax(x: Tensor, table: Tensor, placement: str) -> Tensor:
    """A marker: softmax over the last axis of an edge, with ``table[i]`` for ``exp(-i * scale)``."""
    return _symbol(SOFTMAX, x, table, placement=placement)


def norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, placement: str) -> Tensor:
    """A marker: layer norm over the last axes."""
    return _symbol(NORM, x, weight, bias, placement=placement, eps=repr(eps), axes=len(shape), n=math.prod(shape))


def again(x: Tensor, placement: str) -> Tensor:
    """A marker: values of an edge that were moved are quantized again, which changes none."""
    return _symbol(AGAIN, x, placement=placement)


def _symbol(op: str, x: Tensor, *others: Tensor | None, **attributes: Any) -> Tensor:
    marked: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", (x, *others), dict(attributes), dtype=x.dtype, shape=x.shape, version=1)
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
    if isinstance(module, ExactMatmul):
        sides = zip(args, node.args, module.quantizers, strict=True)
        return new.call_function(module.aten, tuple(_next_to(new, x, of, quantizer, graph) for x, of, quantizer in sides))
    if isinstance(module, ExactLinear):
        x = _next_to(new, args[0], node.args[0], module.quantizers[0], graph)
        product = new.call_function(aten.matmul.default, (x, new.call_function(aten.t.default, (args[1],))))
        return product if len(args) < 3 or args[2] is None else new.call_function(aten.add.Tensor, (product, args[2]))
    if isinstance(module, ExactNorm):
        weight, bias, eps = args[2:5] if len(args) > 4 else (*args[2:], *(None, None, 1e-5)[len(args) - 2 :])
        return new.call_function(norm, (args[0], args[1], weight, bias, eps, module.quantizers[0].name))
    if isinstance(module, ExactSoftmax) and fits(quantizer := module.quantizers[0]):
        return _with_table(new, softmax, args[0], quantizer, exp_table(quantizer.affine_params().scale.item()), constants)
    if op_of(node, graph) not in FUNCTIONS or len(node.all_input_nodes) != 1:
        return None
    before = quantizer_before_moves(node.args[0], graph)
    if before is None or not before.calibrated or not fits(before) or before.spec.follow == "dynamic":
        return None
    return _with_table(new, look_up, args[0], before, _function_table(node, Grid.of(before.affine_params())), constants)


def _next_to(new: fx.Graph, x: fx.Node, of: Any, quantizer: FakeQuantizer, graph: fx.GraphModule) -> fx.Node:
    """``x``, behind a quantizer again if ops stand between that runtimes don't move a DequantizeLinear past.

    Args:
        of: what ``x`` is a copy of.
    """
    while quantizer_of(of, graph) is None:
        if op_of(of, graph) not in RUNTIMES_SEE_THROUGH:
            return new.call_function(again, (x, quantizer.name))
        of = of.args[0]
    return x


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
        write = {SOFTMAX: writer.write_softmax, LOOK_UP: writer.write_look_up, NORM: writer.write_norm, AGAIN: writer.write_again}
        write[marker.op_type]()
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _keep_apart(model, node)
        elif node.op_type == "Add" and _is_bias_of_a_matrix(node):
            node.op_type = "Sum"  # MatMul and Add of matrices become a Gemm, which runtimes leave in floating point


def _markers(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in (LOOK_UP, SOFTMAX, NORM, AGAIN):
            yield node, node.attributes[PLACEMENT].as_string()


def _is_bias_of_a_matrix(add: ir.Node) -> bool:
    product, shape = source(add).producer(), add.outputs[0].shape
    return product is not None and product.op_type == "MatMul" and shape is not None and len(shape) == 2


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
    out.name, out.shape = f"{x.name}.apart", x.shape
    out.dtype = ir.DataType.FLOAT
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
        self._finish(self._entries(table, index))

    def write_again(self) -> None:
        self._finish(self._node("DequantizeLinear", [self._quantized(), *self._grid()], FLOAT, "dequantized"))

    def write_softmax(self) -> None:
        q, last = self._int32(), self._constant("last_axis", torch.tensor([-1]))
        largest = self._node("ReduceMax", [q, last], INT32, "largest")
        below = self._node("Sub", [largest, q], INT32, "below")
        e = self._entries(self._table(), below)
        wide = self._node("Cast", [e], DOUBLE, "exp_float64", to=DOUBLE)
        total = self._node("Cast", [self._node("ReduceSum", [wide, last], DOUBLE, "sum_float64")], FLOAT, "sum", to=FLOAT)
        self._finish(self._node("Div", [e, total], FLOAT, "softmax"))

    def write_norm(self) -> None:
        x, weight, bias = (*self.marker.inputs, None, None)[:3]
        n, eps = (torch.tensor(float(self.marker.attributes[name].value), dtype=torch.float64) for name in ("n", "eps"))
        axes = self._constant("axes", torch.arange(-self.marker.attributes["axes"].as_int(), 0))
        mean = self._node("Cast", [self._mean(x, axes, self._constant("n", n), "mean")], FLOAT, "mean", to=FLOAT)
        c = self._node("Sub", [x, mean], FLOAT, "centred")
        variance = self._mean(
            self._node("Mul", [c, c], FLOAT, "squared"), axes, self.graph.initializers[f"{self.marker.name}.n"], "variance"
        )
        above = self._node("Add", [variance, self._constant("eps", eps)], DOUBLE, "variance_eps")
        deviation = self._node("Cast", [self._node("Sqrt", [above], DOUBLE, "sqrt")], FLOAT, "deviation", to=FLOAT)
        y = self._node("Div", [c, deviation], FLOAT, "normed")
        y = y if weight is None else self._node("Mul", [y, weight], FLOAT, "weighted")
        self._finish(y if bias is None else self._node("Add", [y, bias], FLOAT, "norm"))

    def _mean(self, x: ir.Value | None, axes: ir.Value, n: ir.Value, what: str) -> ir.Value:
        wide = self._node("Cast", [x], DOUBLE, f"{what}_of", to=DOUBLE)
        return self._node("Div", [self._node("ReduceSum", [wide, axes], DOUBLE, f"{what}_sum"), n], DOUBLE, f"{what}_float64")

    def _entries(self, table: Tensor, index: ir.Value) -> ir.Value:
        """``table[index]``. Of one axis, and by GatherElements: ONNX Runtime's Gather copies entry by entry, 18 times slower."""
        flat = self._node("Reshape", [index, self._constant("flat", torch.tensor([-1]))], INT32, "indices")
        entries = self._node("GatherElements", [self._constant("table", table), flat], FLOAT, "entries")
        return self._node("Reshape", [entries, self._node("Shape", [index], INT64, "shape")], FLOAT, "looked_up")

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
            return self._node("Cast", [before.inputs[0]], INT32, "int32", to=INT32)
        return self._node("Cast", [self._quantized()], INT32, "int32", to=INT32)

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
