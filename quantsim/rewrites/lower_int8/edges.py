"""Quantized edges → integers in storage: ``to_integers`` behind the op that makes the edge, ``from_integers`` before those that read it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from quantsim.graph.roles import KEEPS_GRID, op_of
from quantsim.kernels.edges import EDGE, GRID, SHAPE, Grid, from_integers, from_own_range, on_grid, to_integers
from quantsim.quantizers.exact_op import fits
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer
from quantsim.quantizers.following import DynamicIntegers, moves_with_tensors
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.rewrites.lower_int8.whole import put_beside

MOVES = KEEPS_GRID - {"to", "type_as"}  # a conversion to float32 is no move of integers
ROOM = "edges"
LISTS = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}


@dataclass(frozen=True)
class OwnGrid:
    """The quantization of an edge whose range is each tensor's own: :class:`Grid`, with nodes that give scale and zero point."""

    scale: fx.Node
    zero_point: fx.Node
    quant_min: int
    quant_max: int


def edges_to_integers(graph: fx.GraphModule) -> None:
    """Every activation quantizer of at most 8 bits with one range becomes ``to_integers`` and ``from_integers``.

    One whose range is each tensor's own becomes :class:`DynamicIntegers` and ``from_own_range``.
    """
    for node in list(graph.graph.nodes):
        quantizer = quantizer_of(node, graph)
        if quantizer is None or isinstance(quantizer, WeightQuantizer):
            continue
        node.meta = node.meta | {EDGE: quantizer.name}
        if not fits(quantizer):
            continue
        with graph.graph.inserting_before(node):
            read = _dynamic(graph, node, quantizer) if moves_with_tensors(quantizer) else _static(graph, node, quantizer)
        node.replace_all_uses_with(read)
        graph.graph.erase_node(node)


def _static(graph: fx.GraphModule, node: fx.Node, quantizer: FakeQuantizer) -> fx.Node:
    grid = Grid.of(quantizer.affine_params())
    stored = graph.graph.call_function(to_integers, (node.args[0], *grid.numbers))
    stored.meta = {EDGE: quantizer.name, GRID: grid}
    return dequantize(graph, stored, grid)


def _dynamic(graph: fx.GraphModule, node: fx.Node, quantizer: FakeQuantizer) -> fx.Node:
    path = put_beside(graph, f"{ROOM}.{quantizer.name}", DynamicIntegers(quantizer.spec, quantizer.name))
    found = graph.graph.call_module(path, (node.args[0],))
    stored, scale, zero_point = (graph.graph.call_function(operator.getitem, (found, i)) for i in range(3))
    return dequantize(graph, stored, OwnGrid(scale, zero_point, quantizer.spec.quant_min, quantizer.spec.quant_max))


def dequantize(graph: fx.GraphModule, stored: fx.Node, grid: Grid | OwnGrid) -> fx.Node:
    """A node that reads integers as float32, at the graph's insertion point."""
    function = from_integers if isinstance(grid, Grid) else from_own_range
    read = graph.graph.call_function(function, (stored, grid.scale, grid.zero_point))
    read.meta = {GRID: grid}
    return read


def sink_dequantize(graph: fx.GraphModule) -> None:
    """Move values as integers: ``view(from_integers(q))`` becomes ``from_integers(view(q))``, and so for every op that only moves."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or op_of(node, graph) not in MOVES or node.target is operator.getitem:
            continue
        read = node.args[0]
        if not (isinstance(read, fx.Node) and read.target in (from_integers, from_own_range)):
            continue
        stored, grid = read.args[0], read.meta[GRID]
        node.update_arg(0, stored)
        for moved in _tensors_from(node, graph):
            users = list(moved.users)
            with graph.graph.inserting_after(moved):
                back = dequantize(graph, moved, grid)
            for user in users:
                user.replace_input_with(moved, back)
            shape = moved.meta["val"].shape
            moved.meta = {k: v for k, v in moved.meta.items() if k != "val"} | {GRID: grid, SHAPE: shape}


def _tensors_from(node: fx.Node, graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The node itself, or what is taken from the list that it makes."""
    if op_of(node, graph) in LISTS:
        yield from list(node.users)
    else:
        yield node


def forget_unread_integers(graph: fx.GraphModule) -> None:
    """An edge that only floating-point ops read isn't stored: ``from_integers(to_integers(x))`` becomes ``on_grid(x)``."""
    for node in list(graph.graph.find_nodes(op="call_function", target=to_integers)):
        if any(user.target is not from_integers for user in node.users):
            continue
        with graph.graph.inserting_after(node):
            value = graph.graph.call_function(on_grid, node.args)
        value.meta = dict(node.meta)
        for user in list(node.users):
            user.replace_all_uses_with(value)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
