"""Attention whose every edge has 8 bits → one kernel of integers for scores, mask, softmax and context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES, EDGE, GRID, SHAPE, Grid, from_integers, to_integers
from quantsim.kernels.int8_attention import DEPTHS, LARGEST_DEPTH, AttentionGrids, Int8Attention, missing_for_attention
from quantsim.kernels.int8_matmul import scaled_matmul
from quantsim.rewrites.lower_int8.weights import ROOM
from quantsim.rewrites.lower_int8.whole import put_beside

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
    stored = _sole_user(context)
    if stored is None or stored.target is not to_integers:
        return None
    probabilities, softmax = _behind_quantizer(context.args[0], stored_as_integers=True)
    if probabilities is None or not _reads_once(softmax, "softmax", graph) or softmax.args[1] != -1:
        return None
    masked, x = _behind_quantizer(softmax.args[0])
    mask = None
    if _reads_once(x, "add", graph):
        x, mask = x.args[:2]  # type: ignore[union-attr]
    scaled, x = _behind_quantizer(x)
    factor, divides = 1.0, False
    if isinstance(x, fx.Node) and op_of(x, graph) in ("mul", "div") and isinstance(x.args[1], (int, float)) and _sole_user(x):
        factor, divides = float(x.args[1]), op_of(x, graph) == "div"
        scores, x = _behind_quantizer(x.args[0])
    else:
        scores, scaled = scaled, None
    if not isinstance(x, fx.Node) or x.target is not scaled_matmul or _sole_user(x) is None or not _fits(x, context, mask):
        return None
    grids = AttentionGrids(
        query=_grid(x, 0), key=_grid(x, 1), value=_grid(context, 1), scores=scores, factor=factor, divides=divides, scaled=scaled,
        masked=masked, probabilities=probabilities, context=stored.meta[GRID],
    )  # fmt: skip
    return _Found(*x.args[:2], context.args[1], mask, grids, str(context.meta[COMPUTES]), stored)  # type: ignore[arg-type]


def _behind_quantizer(node: object, stored_as_integers: bool = False) -> tuple[Grid | None, fx.Node | None]:
    """The grid that the node's values are on, if it alone reads them from there, and what is quantized; else the node itself."""
    stored = node if stored_as_integers else None
    if isinstance(node, fx.Node) and node.target is from_integers and _sole_user(node) is not None:
        stored = node.args[0]
    if isinstance(stored, fx.Node) and stored.target is to_integers and _sole_user(stored) is not None:
        return stored.meta[GRID], stored.args[0]  # type: ignore[return-value]
    return None, node if isinstance(node, fx.Node) else None


def _fits(scores: fx.Node, context: fx.Node, mask: object) -> bool:
    """Four dimensions, a depth that the kernel takes, the same on each side, and a mask of floats."""
    query, keys, value = (node.meta.get(SHAPE, ()) for node in (*scores.args[:2], context.args[1]))  # type: ignore[union-attr]
    if not len(query) == len(keys) == len(value) == 4:
        return False
    depth = query[-1]
    if not isinstance(depth, int) or depth % DEPTHS or depth > LARGEST_DEPTH or value[-1] != depth:
        return False
    if mask is None:
        return True
    return isinstance(mask, fx.Node) and len(mask.meta["val"].shape) <= 4 and mask.meta["val"].dtype == torch.float32


def _grid(product: fx.Node, side: int) -> Grid:
    grid: Grid = product.args[side].meta[GRID]  # type: ignore[union-attr]
    return grid


def _reads_once(node: object, op: str, graph: fx.GraphModule) -> bool:
    return isinstance(node, fx.Node) and op_of(node, graph) == op and not node.kwargs and _sole_user(node) is not None


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
