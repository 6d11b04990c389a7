"""Tensors that a forward makes of numbers: export lifts them out, and a graph needs a place for them."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, fx, nn

ROOM = "constants"


def keep_constants(graph: fx.GraphModule, model: nn.Module) -> None:
    """Give the tensors that the graph reads and the model has nowhere a room of their own: buffers that are not saved; in place."""
    for node in graph.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if _has(model, path) or not isinstance(value := attrgetter(path)(graph), Tensor):
            continue
        *parents, name = f"{ROOM}.{path}".split(".")
        room: nn.Module = graph
        for part in parents:
            if not hasattr(room, part):
                room.add_module(part, nn.Module())
            room = getattr(room, part)
        room.register_buffer(name, value, persistent=False)
        node.target = f"{ROOM}.{path}"


def _has(model: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(model)
    except AttributeError:
        return False
    return True
