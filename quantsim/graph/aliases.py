"""Ops that write into their input, replaced by those that do not: what a quantizer gives is kept for its gradient."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def out_of_place(graph: fx.GraphModule) -> None:
    """``scores += bias`` → ``scores + bias``, where nothing else that shares the memory is read afterwards; in place.

    A write that is seen elsewhere (into a slice of a tensor, into a buffer) stays.
    """
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        functional = _functional(node)
        if functional is None:
            continue
        shared = _sharing_memory(node.args[0])
        if any(n.op in ("placeholder", "get_attr") for n in shared):
            continue
        others = shared - _views_of(node) - {node.args[0]}
        if any(order[user] > order[node] for n in others for user in n.users):
            continue
        for user in list(node.args[0].users):
            if order[user] > order[node]:
                user.replace_input_with(node.args[0], node)
        node.target = functional
    graph.recompile()


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that gives what this one writes."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return None
    name, overload = op._schema.name.split("::")[1], op._overloadname
    writes = op._schema.arguments and op._schema.arguments[0].alias_info is not None and op._schema.arguments[0].alias_info.is_write
    if not writes or not name.endswith("_"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    return getattr(packet, overload, None) if packet is not None else None


def _sharing_memory(node: fx.Node) -> set[fx.Node]:
    """The node, what it is a view of, and every view of that."""
    base = node
    while _may_alias(base) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    return _views_of(base)


def _views_of(node: fx.Node) -> set[fx.Node]:
    """The node and everything that may have its memory from it."""
    found, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user not in found and _may_alias(user):
                found.add(user)
                todo.append(user)
    return found


def _may_alias(node: fx.Node) -> bool:
    """The op may give its input's memory: by its schema, or because it has none."""
    if node.op != "call_function":
        return node.op == "call_module"
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    # ops such as reshape and contiguous say nothing of the view that they often give
    silent = node.target._schema.name.split("::")[1] in (
        "reshape",
        "contiguous",
        "to",
        "flatten",
        "expand_as",
        "view_as",
        "type_as",
        "dropout",
    )
    return silent or any(x.alias_info is not None for x in node.target._schema.returns)
