"""Functions of one 8-bit edge that give an 8-bit edge → tables of 256 entries."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES, EDGE, FUNCTIONS, GRID, Grid, from_integers, look_up, to_integers
from quantsim.rewrites.lower_int8.weights import ROOM, constant


def functions_to_tables(graph: fx.GraphModule) -> None:
    """``to_integers(f(from_integers(q)))`` → ``table[q]``, worked out with the ops that it replaces, so equal to them to the bit."""
    device = next(graph.parameters()).device
    for node in list(graph.graph.find_nodes(op="call_function", target=to_integers)):
        function = node.args[0]
        if op_of(function, graph) not in FUNCTIONS or len(function.users) > 1 or len(function.all_input_nodes) != 1:
            continue
        read = function.args[0]
        if not isinstance(read, fx.Node) or read.target is not from_integers:
            continue
        table = _table(function, read.meta[GRID], node.meta[GRID], device)
        entries = constant(graph, node, f"{ROOM}.{node.meta[EDGE]}.table", table)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(look_up, (read.args[0], entries, read.meta[GRID].quant_min))
        new.meta = {EDGE: node.meta[EDGE], GRID: node.meta[GRID], COMPUTES: function.meta.get(COMPUTES, node.meta[EDGE])}
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _table(function: fx.Node, grid: Grid, out: Grid, device: torch.device) -> Tensor:
    assert callable(function.target)
    return to_integers(function.target(grid.values(device), *function.args[1:], **function.kwargs), *out.numbers)
