"""Which quantizer an edge of a graph has."""

from __future__ import annotations

from torch import fx, nn

from quantsim.graph.roles import KEEPS_GRID, op_of, resolve
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer


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


def not_finite(graph: fx.GraphModule) -> str:
    """The name of the first parameter or range with NaN or infinity in it, and how many; empty where there is none."""
    for name, x in [*graph.named_parameters(), *graph.named_buffers()]:
        if x.is_floating_point() and (count := x.numel() - int(x.isfinite().sum())):
            quantizer = graph.get_submodule(name.rpartition(".")[0])
            if isinstance(quantizer, FakeQuantizer):
                if not quantizer.calibrated:
                    continue
                name = f"the range of {quantizer.name}"
            return f"{name}: holds numbers that are not finite ({count} of {x.numel()})"
    return ""


def own_parameter(node: object, graph: fx.GraphModule) -> nn.Parameter | None:
    """The parameter that the node gives, past its quantizer, if it is one that no other node of the graph reads."""
    if isinstance(quantizer_of(node, graph), WeightQuantizer):
        assert isinstance(node, fx.Node)
        if len(node.users) > 1:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = resolve(graph, str(node.target))
    same = [get for get in graph.graph.find_nodes(op="get_attr") if resolve(graph, str(get.target)) is value]
    return value if isinstance(value, nn.Parameter) and sum(len(get.users) for get in same) == 1 else None
