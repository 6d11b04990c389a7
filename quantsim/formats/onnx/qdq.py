"""Markers → QuantizeLinear and DequantizeLinear, or → nothing but a name.

What each marker becomes (``q`` integers, ``s`` scale, ``z`` zero point)::

    weight                 Edge(w)               DequantizeLinear(q, s, z)          q an initializer
    embedding              Edge(Gather(w, ids))  DequantizeLinear(Gather(q, ids))   bytes are looked up, rows dequantized
    activation             Edge(x)               DequantizeLinear(QuantizeLinear(x))
    grid within its type   Edge(x)               …(QuantizeLinear(Clip(x, low, high)))

An embedding with a range for each row is dequantized whole, before the look-up: a look-up would need the rows' scales too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantsim.formats.onnx.edges import StoredEdge, integers_of
from quantsim.formats.onnx.markers import DOMAIN, EDGE, PLACEMENT, replace, source
from quantsim.numerics.affine import AffineParams, grid_range

if TYPE_CHECKING:
    import onnx_ir as ir


def insert_qdq(model: ir.Model, edges: Mapping[str, StoredEdge]) -> dict[str, str]:
    """Put QDQ in place of every marker, in place; a quantizer that is off leaves its tensor as it is.

    Returns:
        Placement → the tensor that holds its integers.
    """
    tensors: dict[str, str] = {}
    for marker, name in _markers(model):
        edge = edges[name]
        if edge.params is None:
            _bypass(marker)
            continue
        tensors[name] = _Qdq(model, name, edge).replace(marker)
    return tensors


def name_edges(model: ir.Model) -> dict[str, str]:
    """Take the markers out, in place, and name every marked tensor after its placement where it is no input or output.

    Returns:
        Placement → the tensor's name; for an embedding's rows that of the table.
    """
    marked: dict[str, ir.Value] = {}
    for marker, name in _markers(model):
        x = source(marker)
        marked[name] = _table_behind(x) or x
        _bypass(marker)
    sweep(model)
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    for name, value in marked.items():
        if not value.is_graph_input() and not value.is_graph_output() and name not in taken:
            value.name = name
    return {name: str(value.name) for name, value in marked.items()}


def _markers(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == EDGE:
            yield node, node.attributes[PLACEMENT].as_string()


def _table_behind(x: ir.Value) -> ir.Value | None:
    """The table that a look-up takes its rows from, if ``x`` is one."""
    node = x.producer()
    if node is None or node.op_type != "Gather" or (table := node.inputs[0]) is None:
        return None
    return table if table.is_initializer() else None


def _bypass(marker: ir.Node) -> None:
    replace(marker, source(marker))


def sweep(model: ir.Model) -> None:
    """Drop the floating-point weights that nothing reads any more, and the markers' domain."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)


class _Qdq:
    """Writes one edge."""

    def __init__(self, model: ir.Model, name: str, edge: StoredEdge) -> None:
        import onnx_ir as ir

        assert edge.params is not None
        self.graph, self.name, self.edge = model.graph, name, edge
        self.params: AffineParams = edge.params
        self.type = ir.DataType[edge.type]

    def replace(self, marker: ir.Node) -> str:
        """Put QDQ in the marker's place; the name of the tensor with the integers."""
        x = source(marker)
        if (table := _table_behind(x)) is not None and self.edge.is_weight:
            integers = self._constant_integers(table)
            looked_up = x.producer()
            assert looked_up is not None
            rows = self._node(marker, "Gather", [integers, looked_up.inputs[1]], self.type, x, "rows", looked_up.attributes)
            holder, stored = integers, rows
        elif x.is_initializer():
            holder = stored = self._constant_integers(x)
        else:
            clipped = x if self.edge.fills_type else self._clipped(marker, x)
            holder = stored = self._node(marker, "QuantizeLinear", [clipped, *self._grid()], self.type, x, "quantized", self._axis())
        read = self._node(marker, "DequantizeLinear", [stored, *self._grid()], marker.outputs[0].dtype, x, "dequantized", self._axis())
        replace(marker, read)
        return str(holder.name)

    def _grid(self) -> tuple[ir.Value, ir.Value]:
        return self._initializer("scale", self.params.scale), self._initializer("zero_point", self.params.zero_point, self.type)

    def _axis(self) -> dict[str, Any]:
        import onnx_ir as ir

        return {} if self.params.axis is None else {"axis": ir.AttrInt64("axis", self.params.axis)}

    def _clipped(self, marker: ir.Node, x: ir.Value) -> ir.Value:
        """QuantizeLinear saturates where its type ends: clamp to the grid's ends, which are values of the grid and so exact."""
        low, high = grid_range(self.params)
        if self.params.axis is None:
            ends = [self._initializer("low", low), self._initializer("high", high)]
            return self._node(marker, "Clip", [x, *ends], x.dtype, x, "clipped")
        assert x.shape is not None
        low, high = (self.params.broadcast(end, len(x.shape)) for end in (low, high))
        above = self._node(marker, "Max", [x, self._initializer("low", low)], x.dtype, x, "above")
        return self._node(marker, "Min", [above, self._initializer("high", high)], x.dtype, x, "clipped")

    def _constant_integers(self, x: ir.Value) -> ir.Value:
        assert x.const_value is not None
        value = torch.from_numpy(x.const_value.numpy().copy())
        return self._initializer("quantized", integers_of(value, self.params), self.type)

    def _initializer(self, what: str, value: Tensor, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant of this edge; made once, where a weight is used twice."""
        import onnx_ir as ir

        name = f"{self.name}.{what}"
        if name not in self.graph.initializers:
            array = value.detach().cpu().numpy()
            tensor = ir.tensor(array if dtype is None else array.astype(dtype.numpy()), dtype=dtype, name=name)
            self.graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
            )
        return self.graph.initializers[name]

    def _node(
        self, marker: ir.Node, op: str, inputs: list[Any], dtype: ir.DataType | None, like: ir.Value, what: str, attributes: Any = None
    ) -> ir.Value:
        """A node before the marker, with an output of the shape of ``like``."""
        import onnx_ir as ir

        name = f"{self.name}.{what}"
        made = ir.Node("", op, inputs, attributes=list((attributes or {}).values()), name=f"{name}.{marker.name}")
        out = made.outputs[0]
        assert dtype is not None
        out.name, out.shape, out.dtype = name, like.shape, dtype
        self.graph.insert_before(marker, made)
        return out
