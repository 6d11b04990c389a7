"""Attention whose every edge has 8 bits → one kernel of integers for scores, mask, softmax and context."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import fx

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES, EDGE, GRID, SHAPE, Grid, from_integers, to_integers
from quantsim.kernels.int8_attention import DEPTHS, LARGEST_DEPTH, AttentionGrids, Int8Attention, missing_for_attention
from quantsim.kernels.int8_matmul import scaled_matmul
from quantsim.rewrites.lower_int8.weights import ROOM
from quantsim.rewrites.lower_int8.whole import put_beside, sole_user

aten = torch.ops.aten


class _Found(NamedTuple):
    query: fx.Node
    keys: fx.Node  # transposed: [..., depth, keys]
    value: fx.Node
    mask: fx.Node | None
    grids: AttentionGrids
    name: str
    stored: fx.Node  # to_integers of the context


def attention_to_integers(graph: fx.GraphModule) -> None:
    """The ops from ``scaled_matmul(query, keys)`` to the integers of the context → :class:`Int8Attention`, where its kernel runs here."""
    products = list(graph.graph.find_nodes(op="call_function", target=scaled_matmul))
    if not products or missing_for_attention():
        return
    for context in products:
        found = _attention(context, graph)
        if found is None:
            continue
        path = put_beside(graph, f"{ROOM}.{found.name}.attention", Int8Attention(found.grids))
        with graph.graph.inserting_before(found.stored):
            key = graph.graph.call_function(aten.transpose.int, (found.keys, -2, -1))
            inputs = (found.query, key, found.value) + (() if found.mask is None else (found.mask,))
            new = graph.graph.call_module(path, inputs)
        new.meta = {EDGE: found.stored.meta[EDGE], GRID: found.grids.context, COMPUTES: found.name}
        found.stored.replace_all_uses_with(new)
        graph.graph.erase_node(found.stored)
    graph.graph.eliminate_dead_code()


def _attention(context: fx.Node, graph: fx.GraphModule) -> _Found | None:
    """The attention whose context this product is, if each edge between is on a grid of 8 bits or read once."""
    stored = sole_user(context)
    if stored is None or stored.target is not to_integers:
        return None
    probabilities, softmax = _quantized(context.args[0])
    if probabilities is None or not _reads_once(softmax, "softmax", graph) or softmax.args[1] != -1:
        return None
    masked, x = _behind_quantizer(softmax.args[0])
    mask: object = None
    if _reads_once(x, "add", graph):
        mask, x = x.args[1], x.args[0]
    scaled, x = _behind_quantizer(x)
    scores, factor, divides = scaled, 1.0, False
    if _reads_once(x, "mul", graph) or _reads_once(x, "div", graph):
        factor, divides = x.args[1], op_of(x, graph) == "div"  # type: ignore[assignment]
        scores, x = _behind_quantizer(x.args[0])
    else:
        scaled = None
    if not isinstance(factor, (int, float)) or not isinstance(x, fx.Node) or x.target is not scaled_matmul or sole_user(x) is None:
        return None
    query, keys, value = x.args[0], x.args[1], context.args[1]
    if not _fits(query, keys, value, mask):
        return None
    grids = AttentionGrids(
        query=_grid(query), key=_grid(keys), value=_grid(value), scores=scores, factor=float(factor), divides=divides, scaled=scaled,
        masked=masked, probabilities=probabilities, context=stored.meta[GRID],
    )  # fmt: skip
    return _Found(query, keys, value, mask, grids, str(context.meta[COMPUTES]), stored)  # type: ignore[arg-type]


def _quantized(stored: object) -> tuple[Grid | None, object]:
    """The grid of integers that one node alone reads, and what was quantized."""
    if isinstance(stored, fx.Node) and stored.target is to_integers and sole_user(stored) is not None:
        return stored.meta[GRID], stored.args[0]
    return None, stored


def _behind_quantizer(node: object) -> tuple[Grid | None, object]:
    """The grid that values are read from, and what was quantized; ``None`` and the node itself where there is no quantizer."""
    if isinstance(node, fx.Node) and node.target is from_integers and sole_user(node) is not None:
        grid, x = _quantized(node.args[0])
        return (None, node) if grid is None else (grid, x)
    return None, node


def _fits(query: object, keys: object, value: object, mask: object) -> bool:
    """Four dimensions, a depth that the kernel takes, the same on each side, and a mask of floats."""
    shapes = [node.meta.get(SHAPE, ()) for node in (query, keys, value) if isinstance(node, fx.Node)]
    if [len(shape) for shape in shapes] != [4, 4, 4]:
        return False
    depth = shapes[0][-1]
    if not isinstance(depth, int) or depth % DEPTHS or depth > LARGEST_DEPTH or shapes[2][-1] != depth:
        return False
    if mask is None:
        return True
    value = mask.meta.get("val") if isinstance(mask, fx.Node) else None  # integers that were read back have none
    return isinstance(value, torch.Tensor) and value.ndim <= 4 and value.dtype == torch.float32


def _grid(node: object) -> Grid:
    assert isinstance(node, fx.Node)
    grid: Grid = node.meta[GRID]
    return grid


def _reads_once(node: object, op: str, graph: fx.GraphModule) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and op_of(node, graph) == op and not node.kwargs and sole_user(node) is not None
