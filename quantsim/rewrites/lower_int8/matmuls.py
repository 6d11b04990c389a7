"""Products of two quantized edges (an attention's scores, its context) → products of integers, computed in float32, exact."""

from __future__ import annotations

from torch import fx

from quantsim.kernels.edges import COMPUTES, GRID, from_integers
from quantsim.kernels.int8_matmul import scaled_matmul
from quantsim.quantizers.exact_matmul import ExactMatmul


def matmuls_to_integers(graph: fx.GraphModule) -> None:
    """``matmul(from_integers(a), from_integers(b))`` → :func:`scaled_matmul` of ``a`` and ``b``: the simulation's values to the bit."""
    for node in list(graph.graph.find_nodes(op="call_module")):
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, ExactMatmul):
            continue
        if not all(isinstance(side, fx.Node) and side.target is from_integers for side in node.args):
            node.op, node.target = "call_function", module.aten
            continue
        a, b = (side.args[0] for side in node.args)
        of_a, of_b = (side.meta[GRID] for side in node.args)
        with graph.graph.inserting_before(node):
            numbers = (of_a.zero_point, of_b.zero_point, of_a.scale * of_b.scale)
            product = graph.graph.call_function(scaled_matmul, (a, b, *numbers))
        product.meta = {COMPUTES: node.meta.get(COMPUTES, node.name)}
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
