"""Placements → quantizers in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from quantsim.config import QuantSpec
from quantsim.graph.place import Placement
from quantsim.graph.roles import KEEPS_GRID, MASK_ADD, MASK_FILL, WEIGHTS, op_of, resolve
from quantsim.quantizers.fake_quantizer import FakeQuantizer, MaskedScoreQuantizer, WeightQuantizer
from quantsim.quantizers.following import FollowingQuantizer, FollowingWeightQuantizer

ROOM = "quantizers"


def insert_quantizers(graph: fx.GraphModule, placements: Sequence[Placement], training: bool = False) -> fx.GraphModule:
    """Put a quantizer on every placed edge, as the submodule ``quantizers.<name>``; in place, and returned.

    An embedding's weight with one range is quantized row by row as rows are looked up: the same values, and the work of
    a batch in place of that of a vocabulary. Not where its range follows the weight, which then has to be seen whole.

    Args:
        graph: traced.
        placements: of its edges.
        training: the mode that the model is in.
    """
    quantizers: dict[str, FakeQuantizer] = {}
    rows: dict[fx.Node, fx.Node] = {}  # an embedding → its quantized rows
    placed = [p for p in placements if p.spec is not None]
    for p in sorted(placed, key=lambda p: p.role != "weight"):
        if p.name not in quantizers:
            quantizers[p.name] = _make(p).train(training)
            graph.add_submodule(f"{ROOM}.{p.name}", quantizers[p.name])
        if p.role == "weight" and not quantizes_rows(p):
            assert p.weight is not None
            with graph.graph.inserting_before(p.node):
                quantized = _call(graph, p, p.weight)
            if p.node.args[int(p.edge)] is p.weight:
                p.node.update_arg(int(p.edge), quantized)
            else:  # one of a list of tensors
                p.node.replace_input_with(p.weight, quantized)
            continue
        if p.readers:
            _before_readers(graph, p)
            continue
        source = rows.get(p.node, p.node)
        with graph.graph.inserting_after(source):
            quantized = _call(graph, p, source)
        source.replace_all_uses_with(quantized, delete_user_cb=lambda user, own=quantized: user is not own)  # type: ignore[misc]
        quantizers[p.name].overwrites = _is_fresh(p.node)
        if p.role == "weight":
            rows[p.node] = quantized
    graph.graph.lint()
    graph.recompile()
    return graph


def quantizes_rows(p: Placement) -> bool:
    """The quantizer of this weight sits behind the look-up."""
    return p.node.target is torch.ops.aten.embedding.default and p.role == "weight" and _has_one_fixed_range(p.spec)


def _has_one_fixed_range(spec: QuantSpec | None) -> bool:
    return spec is not None and spec.axis is None and spec.follow == "no"


@torch.no_grad()
def weights_of(graph: fx.GraphModule) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Every weight quantizer once, with the whole weight that it quantizes, computed where it is computed."""
    seen: set[str] = set()
    for node in graph.graph.find_nodes(op="call_module"):
        quantizer = graph.get_submodule(str(node.target))
        if not isinstance(quantizer, WeightQuantizer) or node.target in seen:
            continue
        seen.add(str(node.target))
        weight = node.args[0]
        if op_of(weight, graph) == "embedding":
            weight = weight.args[WEIGHTS["embedding"].index]
        yield quantizer, evaluate(graph, weight)


def evaluate(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node that depends on parameters alone."""
    if node.op == "get_attr":
        return resolve(graph, str(node.target))  # type: ignore[return-value]
    assert callable(node.target)
    args = fx.map_arg(node.args, lambda n: evaluate(graph, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: evaluate(graph, n))
    return node.target(*args, **kwargs)  # type: ignore[no-any-return]


def _before_readers(graph: fx.GraphModule, p: Placement) -> None:
    """Quantize the edge for the ops in ``p.readers`` alone, past ops that only move its values, as late as others read them too."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, user in _edges_to(p.node, p.readers, graph):
        found.setdefault(source, []).append(user)
    for source, users in found.items():
        with graph.graph.inserting_after(source):
            quantized = _call(graph, p, source)
        for user in users:
            user.replace_input_with(source, quantized)


def _edges_to(node: fx.Node, ops: Sequence[str], graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    for user in list(node.users):
        if _only_for(user, ops, graph):
            yield node, user
        elif op_of(user, graph) in KEEPS_GRID:
            yield from _edges_to(user, ops, graph)


def _only_for(node: fx.Node, ops: Sequence[str], graph: fx.GraphModule) -> bool:
    """The node is one of these ops, or moves values that nothing else reads."""
    op = op_of(node, graph)
    return op in ops or (op in KEEPS_GRID and bool(node.users) and all(_only_for(user, ops, graph) for user in node.users))


def _is_fresh(node: fx.Node) -> bool:
    """The node computes a new tensor: no input, no op that writes to one, and no view of one."""
    return isinstance(node.target, torch._ops.OpOverload) and all(x.alias_info is None for x in node.target._schema.returns)


def _call(graph: fx.GraphModule, p: Placement, x: fx.Node) -> fx.Node:
    node = graph.graph.call_module(f"{ROOM}.{p.name}", (x,))
    node.meta = {key: x.meta[key] for key in ("val", "nn_module_stack") if key in x.meta}
    return node


def _make(p: Placement) -> FakeQuantizer:
    assert p.spec is not None
    value = (p.weight or p.node).meta["val"]
    channels = None if p.spec.axis is None else value.shape[p.spec.axis]
    if p.spec.follow != "no":
        return (FollowingWeightQuantizer if p.role == "weight" else FollowingQuantizer)(p.spec, p.name, channels)
    if p.role == "weight":
        return WeightQuantizer(p.spec, p.name, channels)
    kind = MaskedScoreQuantizer if p.attention in (MASK_ADD, MASK_FILL) else FakeQuantizer
    return kind(p.spec, p.name, channels)
