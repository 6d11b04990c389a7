"""Products between quantized edges → :class:`ExactLinear` and :class:`ExactMatmul`."""

from __future__ import annotations

from torch import fx

from quantsim.graph.roles import WEIGHTS, op_of
from quantsim.quantizers.exact_linear import ExactLinear, fits_int8
from quantsim.quantizers.exact_matmul import ExactMatmul
from quantsim.quantizers.exact_product import ExactProduct, fits
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_before_moves, quantizer_of
from quantsim.rewrites.lower_int8.whole import put_beside

ROOM = "products"


def exact_products(graph: fx.GraphModule, training: bool = False) -> fx.GraphModule:
    """Every product whose two sides have grids of at most 8 bits becomes a module that sums integers; in place, and returned.

    That is ``products.<weight's name>`` of a linear, and ``products.<name of the first side's edge>`` of a matmul. A side's quantizer
    may stand before ops that only move values. A layer that is called again has a product a call.

    Args:
        graph: with its quantizers.
        training: the mode that the model is in.
    """
    for node in list(graph.graph.nodes):
        found = _product(node, graph) if node.op == "call_function" else None
        if found is None:
            continue
        name, product = found
        node.target = put_beside(graph, f"{ROOM}.{name}", product.train(training))
        node.op = "call_module"  # the same node, for placements know it
    graph.graph.lint()
    graph.recompile()
    return graph


def _product(node: fx.Node, graph: fx.GraphModule) -> tuple[str, ExactProduct] | None:
    op = op_of(node, graph)
    if op == "linear":
        weight, x = quantizer_of(node.args[WEIGHTS["linear"].index], graph), quantizer_before_moves(node.args[0], graph)
        if x is not None and isinstance(weight, WeightQuantizer) and fits_int8(x, weight):
            return weight.name, ExactLinear(x, weight)
    elif op == "matmul" and all(isinstance(side, fx.Node) and side.meta["val"].ndim > 1 for side in node.args):
        a, b = (quantizer_before_moves(side, graph) for side in node.args)
        if a is not None and b is not None and fits(a) and fits(b):
            return f"{a.name}.matmul", ExactMatmul(a, b)
    return None
