"""Which quantizer an edge of a graph has."""

from __future__ import annotations

from torch import fx

from quantsim.graph.roles import KEEPS_GRID, op_of
from quantsim.quantizers.fake_quantizer import FakeQuantizer


def quantizer_of(node: object, graph: fx.GraphModule) -> FakeQuantizer | None:
    """The quantizer that the node calls, if it is a node and calls one."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, FakeQuantizer) else None


def quantizer_before_moves(node: object, graph: fx.GraphModule) -> FakeQuantizer | None:
    """The quantizer on whose grid the node's values lie: the node's own, or that before ops that move values and do nothing else."""
    while isinstance(node, fx.Node) and quantizer_of(node, graph) is None:
        if op_of(node, graph) not in KEEPS_GRID or op_of(node, graph) == "to" or not node.args:
            return None
        node = node.args[0]
    return quantizer_of(node, graph)
