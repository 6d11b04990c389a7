"""Products, softmax and norms of quantized edges → modules whose sums are exact (:class:`~quantsim.quantizers.exact_op.ExactOp`)."""

from __future__ import annotations

import torch
from torch import fx

from quantsim.graph.roles import WEIGHTS, op_of
from quantsim.quantizers.exact_linear import ExactLinear, fits_int8
from quantsim.quantizers.exact_matmul import ExactMatmul
from quantsim.quantizers.exact_op import ExactOp, fits
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of
from quantsim.rewrites.lower_int8.whole import put_beside

ROOM = "exact"


def exact_ops(graph: fx.GraphModule, training: bool = False) -> fx.GraphModule:
    """Every op whose sums can be exact becomes a module that computes them so; in place, and returned.

    Products need grids of at most 8 bits on both sides, a softmax over the last axis one on its input, a layer norm any. A side's quantizer
    may stand before ops that only move values. A module lies at ``exact.<weight's name>`` of a linear, else at ``exact.<name of the first
    side's edge>.<op>``; a layer that is called again has one a call.

    Args:
        graph: with its quantizers.
        training: the mode that the model is in.
    """
    for node in list(graph.graph.nodes):
        found = _exact(node, graph) if node.op == "call_function" else None
        if found is None:
            continue
        name, op = found
        node.target = put_beside(graph, f"{ROOM}.{name}", op.train(training))
        node.op = "call_module"  # the same node, for placements know it
    graph.graph.lint()
    graph.recompile()
    return graph


def _exact(node: fx.Node, graph: fx.GraphModule) -> tuple[str, ExactOp] | None:
    op = op_of(node, graph)
    if op not in ("linear", "matmul", "softmax", "layer_norm") or node.kwargs:
        return None
    x = quantizer_before_moves(node.args[0], graph)
    if x is None or isinstance(x, WeightQuantizer):
        return None
    if op == "linear":
        weight = quantizer_of(node.args[WEIGHTS["linear"].index], graph)
        return (weight.name, ExactLinear(x, weight)) if isinstance(weight, WeightQuantizer) and fits_int8(x, weight) else None
    if op == "layer_norm":
        return f"{x.name}.layer_norm", ExactNorm(x)
    if not fits(x):
        return None
    if op == "softmax":
        return (f"{x.name}.softmax", ExactSoftmax(x)) if _over_the_last_axis(node) and x.spec.follow != "dynamic" else None
    if not all(isinstance(side, fx.Node) and side.meta["val"].ndim > 1 for side in node.args):
        return None
    other = quantizer_before_moves(node.args[1], graph)
    return (f"{x.name}.matmul", ExactMatmul(x, other)) if other is not None and fits(other) else None


def _over_the_last_axis(softmax: fx.Node) -> bool:
    """It is ATen's ``softmax.int`` (not one that converts, nor one that is safe for rows of -inf), over the last axis."""
    if softmax.target is not torch.ops.aten.softmax.int:
        return False
    axis, value = softmax.args[1], softmax.meta["val"]
    return axis in (-1, value.ndim - 1) and value.dtype == torch.float32 and len(softmax.args) == 2
