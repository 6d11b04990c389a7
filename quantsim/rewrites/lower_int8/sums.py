"""The exact softmax and norms of a simulation → functions of a graph for inference."""

from __future__ import annotations

from torch import fx

from quantsim.kernels.edges import GRID, from_integers
from quantsim.numerics.reproducible import layer_norm, softmax_on_grid
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax


def sums_to_functions(graph: fx.GraphModule, exact: bool) -> None:
    """:class:`ExactSoftmax` and :class:`ExactNorm` → what they compute, or ATen's float32 ops, which a compiler fuses.

    Args:
        exact: the simulation's values to the bit.
    """
    for node in graph.graph.find_nodes(op="call_module"):
        module = graph.get_submodule(str(node.target))
        if isinstance(module, ExactSoftmax):
            x = node.args[0]
            on_grid = exact and isinstance(x, fx.Node) and x.target is from_integers
            node.op, node.target = "call_function", softmax_on_grid if on_grid else module.aten
            if on_grid:
                node.args = (x, x.meta[GRID].scale)
        elif isinstance(module, ExactNorm):
            node.op, node.target = "call_function", layer_norm if exact else module.aten
            node.args = node.args[:5] if exact else node.args
