"""Where learned values enter a graph: the weights of its ops, and parameters that take part in sums, products and lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor, fx

from quantsim.graph.norms import Norm
from quantsim.graph.roles import Roles, WeightArg
from quantsim.graph.trace import module_path

AT_OUTPUT = frozenset({"cat", "stack"})
"""Ops that bring what they take onto the grid of their output."""


@dataclass(frozen=True)
class WeightEdge:
    """An edge that carries a weight.

    Attributes:
        node: takes the weight.
        index: which argument of it is the weight, or the list that holds it.
        weight: a parameter, or the node that computes the weight from parameters.
        axis: of the weight, the output channel of the op that it is for; ``None`` for a vector, a table or what has none.
        op: the op that it is for; a norm that is written out counts as one.
        name: the parameter's path, or of a computed weight the module's path and ``weight``.
    """

    node: fx.Node
    index: int
    weight: fx.Node
    axis: int | None
    op: str
    name: str


def weight_edges(roles: Roles, norms: Iterable[Norm], computed: frozenset[fx.Node]) -> dict[fx.Node, list[WeightEdge]]:
    """Node → the weights of its op, each edge once.

    A parameter that is only turned, cut or joined on its way to an op is met where it starts, so that all its uses are
    of one weight. A bias is none, nor is a scalar.

    Args:
        computed: nodes that compute weights; see :func:`weight_chains`.
    """
    norm_weights = {norm.weight: norm.kind for norm in norms if norm.weight}
    edges: dict[fx.Node, list[WeightEdge]] = {}
    seen: set[tuple[fx.Node, fx.Node]] = set()
    for node in roles.nodes:
        if node not in roles.name or node in computed:
            continue
        found = roles.weight_of(node)
        for value in node.all_input_nodes:
            is_own, in_norm = found is not None and value is found[1], (node, value) in norm_weights
            if not is_own and not _is_weight(node, value, roles):
                continue
            axis = _own_axis(found[0], value) if found is not None and is_own else _channel_axis(node, value, roles)
            op = norm_weights.get((node, value), roles.op[node])
            new = list(_edges(node, value, axis, op, roles)) or ([_computed(node, value, axis, op)] if is_own or in_norm else [])
            edges.setdefault(node, []).extend(e for e in new if (e.node, e.weight) not in seen)
            seen |= {(e.node, e.weight) for e in new}
    return _one_weight_a_name(edges)


def _one_weight_a_name(edges: dict[fx.Node, list[WeightEdge]]) -> dict[fx.Node, list[WeightEdge]]:
    """Number the computed weights of a module that has several; one that is computed anew at every call is one weight."""
    owners = {e.name: _expression(e.weight) for found in edges.values() for e in found if e.weight.op == "get_attr"}

    def named(e: WeightEdge) -> WeightEdge:
        name, number = e.name, 0
        while owners.setdefault(name, _expression(e.weight)) != _expression(e.weight):
            number += 1
            name = f"{e.name}_{number}"
        return replace(e, name=name)

    return {node: [named(e) for e in found] for node, found in edges.items()}


def _expression(node: fx.Node) -> str:
    """How the node is computed, down to the parameters."""
    return (
        str(node.target)
        if node.op == "get_attr"
        else f"{node.target}{fx.map_arg(node.args, _expression)}{fx.map_arg(node.kwargs, _expression)}"
    )


def weight_chains(roles: Roles, norms: Iterable[Norm] = ()) -> frozenset[fx.Node]:
    """Nodes that compute a weight or a bias from parameters (``torch.nn.utils.parametrize``, ``1 + weight`` of a norm)."""
    chained: set[fx.Node] = set()
    todo = [found[1] for node in roles.nodes if (found := roles.weight_of(node))]
    todo += [bias for node in roles.nodes if (bias := roles.bias_of(node))]
    todo += [norm.weight[1] for norm in norms if norm.weight]
    todo += [
        n for node in roles.nodes if roles.op[node] == "matmul" for n in node.all_input_nodes if list(_edges(node, n, None, "", roles))
    ]
    while todo:
        node = todo.pop()
        if node not in chained and roles.sources[node] == {"parameter"}:
            chained.add(node)
            todo += node.all_input_nodes
    return frozenset(chained)


def _is_weight(node: fx.Node, value: fx.Node, roles: Roles) -> bool:
    size = value.meta["val"].numel() if isinstance(value.meta.get("val"), Tensor) else 1
    return roles.sources[value] == {"parameter"} and value is not roles.bias_of(node) and size != 1


def _own_axis(at: WeightArg, value: fx.Node) -> int | None:
    return at.axis if value.meta["val"].ndim > 1 else None


def _channel_axis(node: fx.Node, value: fx.Node, roles: Roles) -> int | None:
    """Of a matrix in a product, the axis that the product keeps; of anything else none."""
    ndim = int(value.meta["val"].ndim)
    if roles.op[node] != "matmul" or ndim < 2:
        return None
    return ndim - 1 if value is node.args[1] else ndim - 2


def _edges(node: fx.Node, value: fx.Node, axis: int | None, op: str, roles: Roles) -> Iterator[WeightEdge]:
    """The edges by which parameters come to be ``value``; none where it is computed of them."""
    if value.op == "get_attr":
        yield WeightEdge(node, _index(node, value), value, axis, op, str(value.target))
    elif (roles.keeps_grid(value) or roles.op[value] in ("dropout", "cat")) and roles.sources[value] == {"parameter"}:
        inputs = [n for n in value.all_input_nodes if roles.sources[n] == {"parameter"}]
        found = [list(_edges(value, n, _axis_before(value, axis, roles), op, roles)) for n in inputs]
        yield from chain.from_iterable(found if all(found) else ())


def _axis_before(node: fx.Node, axis: int | None, roles: Roles) -> int | None:
    """Which axis of the node's input is ``axis`` of its output, where it only turns it."""
    if axis is None:
        return None
    ndim = int(node.meta["val"].ndim)
    op = roles.op[node]
    if op in ("cat", "contiguous", "clone", "detach", "to", "dropout", "alias"):
        return axis
    if op == "t":
        return ndim - 1 - axis
    if op in ("transpose", "permute"):
        order = list(range(ndim))
        if op == "permute":
            order = [int(i) % ndim for i in node.args[1]]  # type: ignore[arg-type, union-attr]
        else:
            a, b = (int(i) % ndim for i in node.args[1:3])  # type: ignore[arg-type]
            order[a], order[b] = b, a
        return order[axis]
    return None


def _computed(node: fx.Node, value: fx.Node, axis: int | None, op: str) -> WeightEdge:
    path = module_path(node).split(".parametrizations")[0]
    return WeightEdge(node, _index(node, value), value, axis, op, ".".join(filter(None, (path, "weight"))))


def _index(node: fx.Node, value: fx.Node) -> int:
    """Which argument is the value, or the list that holds it: the last of them, where a weight stands beside itself."""
    holds = [value is arg or (isinstance(arg, list | tuple) and value in arg) for arg in node.args]
    return len(holds) - 1 - holds[::-1].index(True)
