"""Linears between quantized edges → :class:`ExactLinear`."""

from __future__ import annotations

from torch import fx

from quantsim.graph.roles import WEIGHTS, op_of
from quantsim.quantizers.exact_linear import ExactLinear, fits_int8
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of
from quantsim.rewrites.lower_int8.whole import put_beside

ROOM = "products"


def exact_products(graph: fx.GraphModule, training: bool = False) -> fx.GraphModule:
    """Every linear whose input and weight have grids of at most 8 bits becomes ``products.<weight's name>``; in place, and returned.

    The input's quantizer may stand before ops that only move values. A layer that is called again has a product a call.

    Args:
        graph: with its quantizers.
        training: the mode that the model is in.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or op_of(node, graph) != "linear":
            continue
        weight, x = quantizer_of(node.args[WEIGHTS["linear"].index], graph), quantizer_before_moves(node.args[0], graph)
        if x is None or not isinstance(weight, WeightQuantizer) or not fits_int8(x, weight):
            continue
        node.target = put_beside(graph, f"{ROOM}.{weight.name}", ExactLinear(x, weight).train(training))
        node.op = "call_module"  # the same node, for placements know it
    graph.graph.lint()
    graph.recompile()
    return graph
