"""Attention that is not quantized inside → one kernel for scores, mask, softmax and context."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES
from quantsim.rewrites.lower_int8.whole import sole_user

aten = torch.ops.aten


class _Attention(NamedTuple):
    context: fx.Node
    query: fx.Node
    keys: fx.Node  # transposed: [..., head_dim, keys]
    value: fx.Node
    mask: fx.Node | None
    scale: float


def fuse_attention(graph: fx.GraphModule) -> None:
    """``softmax(query @ keys * scale + mask) @ value`` → ``scaled_dot_product_attention``, where all of it is in floating point."""
    for node in list(graph.graph.nodes):
        found = _attention(node, graph) if node.op == "call_function" and op_of(node, graph) == "softmax" else None
        if found is None:
            continue
        with graph.graph.inserting_before(found.context):
            key = graph.graph.call_function(aten.transpose.int, (found.keys, -2, -1))
            fused = graph.graph.call_function(
                torch.nn.functional.scaled_dot_product_attention,
                (found.query, key, found.value),
                {"attn_mask": found.mask, "scale": found.scale},
            )
        fused.meta = {COMPUTES: found.context.meta.get(COMPUTES, "attention")}
        found.context.replace_all_uses_with(fused)
        graph.graph.erase_node(found.context)


def _attention(softmax: fx.Node, graph: fx.GraphModule) -> _Attention | None:
    context = sole_user(softmax)
    if context is None or not _is(context, "matmul", graph) or context.args[0] is not softmax or softmax.args[1] != -1:
        return None
    scores: Any = softmax.args[0]
    mask, scale = None, 1.0
    added = scores
    if _is(scores, "add", graph):
        scores, mask = scores.args[:2]
    if _is(scores, "mul", graph) and isinstance(scores.args[1], (int, float)):
        scores, scale = scores.args[0], float(scores.args[1])
    elif _is(scores, "div", graph) and isinstance(scores.args[1], (int, float)):
        scores, scale = scores.args[0], 1.0 / float(scores.args[1])
    if not _is(scores, "matmul", graph) or not (mask is None or isinstance(mask, fx.Node)):
        return None
    if mask is not None and added.meta["val"].shape != scores.meta["val"].shape:
        return None  # a mask that widens the scores: the kernel has no room for that
    query, keys, value = *scores.args[:2], context.args[1]
    if not (isinstance(query, fx.Node) and isinstance(keys, fx.Node) and isinstance(value, fx.Node)):
        return None
    return _Attention(context, query, keys, value, mask, scale)


def _is(value: object, op: str, graph: fx.GraphModule) -> TypeGuard[fx.Node]:
    """The value is a node of this op, without options (``add``'s ``alpha``), that one node alone reads."""
    if not isinstance(value, fx.Node) or op_of(value, graph) != op or value.kwargs:
        return False
    return sole_user(value) is not None or op == "matmul"
