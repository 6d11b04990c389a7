"""Regions that torch.export keeps as graphs of their own (``with torch.no_grad()``, ``with torch.autocast(...)``), opened."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

NO_GRAD, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


def open_regions(graph: fx.GraphModule) -> None:
    """Put a region's ops in the place of its call, so that every op is seen; in place.

    What a region without gradients gives is detached, which blocks the same gradients. A region of fixed precision that
    computes masks or positions from integers stays closed: under ``torch.autocast`` it keeps its precision.
    """
    opened = True
    while opened:
        opened = False
        for node in list(graph.graph.nodes):
            name = getattr(node.target, "__name__", "")
            if name == NO_GRAD:
                detaches, region, inputs = not node.args[0], node.args[1], node.args[2:]
            elif name == AUTOCAST and not node.args[2] and any(_is_float(x) for x in node.args[5:]):
                detaches, region, inputs = False, node.args[4], node.args[5:]
            else:
                continue
            _open(graph, node, region, inputs, detaches)
            opened = True
    graph.recompile()


def _is_float(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _open(graph: fx.GraphModule, call: fx.Node, region: Any, inputs: tuple[Any, ...], detaches: bool) -> None:
    path = str(region.target)
    inside = graph.get_submodule(path)
    assert isinstance(inside, fx.GraphModule)
    placeholders = inside.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with graph.graph.inserting_before(call):
        outputs = graph.graph.graph_copy(inside.graph, copies)
        for node in inside.graph.find_nodes(op="get_attr"):
            copies[node].target = f"{path}.{node.target}"
        if detaches:
            outputs = fx.map_arg(outputs, lambda x: _detached(graph, x))
    for user in list(call.users):
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[arg-type, index]
        graph.graph.erase_node(user)
    graph.graph.erase_node(call)
    if not region.users:
        graph.graph.erase_node(region)


def _detached(graph: fx.GraphModule, x: fx.Node) -> fx.Node:
    detached = graph.graph.call_function(aten.detach.default, (x,))
    detached.meta = dict(x.meta)
    return detached
