"""Norms that a model writes out in elementary ops, read from the dataflow.

A root of a mean of squares, and what is divided by it::

    layer_norm:  (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * weight + bias
    rms_norm:    x / sqrt(mean(x²) + eps) * weight + bias

with ``weight`` and ``bias`` where they are there. Between its ops such a norm holds values that an 8-bit grid destroys
(a variance below half a step becomes 0, its root's reciprocal infinite), so it is one op, as ``aten.layer_norm`` is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from quantsim.graph.roles import KEEPS_GRID, Roles

ROOTS = {"sqrt": 0.5, "rsqrt": -0.5}
AROUND_MEAN = frozenset({"add", "clamp", "clamp_min", "maximum"})
SQUARES = frozenset({"pow", "square", "mul"})


@dataclass(frozen=True)
class Norm:
    """One norm.

    Attributes:
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        inside: its computing nodes but for the last.
        output: the last.
        weight: the product and which of its operands is the weight; ``None`` where there is none.
    """

    kind: str
    inside: frozenset[fx.Node]
    output: fx.Node
    weight: tuple[fx.Node, fx.Node] | None


def find_norms(roles: Roles) -> list[Norm]:
    """Every norm that is written out, in the order of the graph."""
    found = (_norm_of(root, roles) for root in roles.nodes if _exponent(root, roles) is not None)
    return [norm for norm in found if norm is not None]


def _exponent(node: fx.Node, roles: Roles) -> float | None:
    op = roles.op[node]
    if op == "pow" and node.args[1] in (0.5, -0.5):
        return float(node.args[1])  # type: ignore[arg-type]
    return ROOTS.get(op)


def _norm_of(root: fx.Node, roles: Roles) -> Norm | None:
    source = _normalized(root, roles)
    if source is None:
        return None
    quotient = roles.sole_user(root)
    if quotient is not None and roles.op[quotient] == "reciprocal":
        quotient = roles.sole_user(quotient)
    if quotient is None or roles.op[quotient] not in ("mul", "div"):
        return None
    numerators = [_source(n, roles) for n in quotient.all_input_nodes if root not in _up(n, roles)]
    if len(numerators) != 1 or not _same(numerators[0], source, roles):
        return None
    x = _source(source.all_input_nodes[0], roles) if _is_centered(source, roles) else source
    output, weight = _scaled_and_shifted(quotient, roles)
    return Norm("rms_norm" if x is source else "layer_norm", _between(x, output, roles), output, weight)


def _normalized(root: fx.Node, roles: Roles) -> fx.Node | None:
    """What the norm's mean of squares is of: ``x - mean(x)`` or ``x``."""
    node = root.all_input_nodes[0]
    while roles.op[node] in AROUND_MEAN | KEEPS_GRID:
        learned = [n for n in node.all_input_nodes if not roles.from_ids_alone(n)]
        if len(learned) != 1:
            return None
        node = learned[0]
    if roles.op[node] != "mean":
        return None
    square = _source(node.all_input_nodes[0], roles)
    if roles.op[square] not in SQUARES or len(square.all_input_nodes) != 1:
        return None
    return None if roles.op[square] == "pow" and square.args[1] != 2 else _source(square.all_input_nodes[0], roles)


def _is_centered(node: fx.Node, roles: Roles) -> bool:
    """``x - mean(x)``."""
    if roles.op[node] != "sub" or len(node.all_input_nodes) != 2:
        return False
    x, mean = node.all_input_nodes
    return roles.op[mean] == "mean" and _source(mean.all_input_nodes[0], roles) is _source(x, roles)


def _same(a: fx.Node, b: fx.Node, roles: Roles) -> bool:
    """The same value: one node, or the same difference from the mean computed twice."""
    if a is b:
        return True
    both = _is_centered(a, roles) and _is_centered(b, roles)
    return both and _source(a.all_input_nodes[0], roles) is _source(b.all_input_nodes[0], roles)


def _scaled_and_shifted(node: fx.Node, roles: Roles) -> tuple[fx.Node, tuple[fx.Node, fx.Node] | None]:
    """The last of ``node``, its product with a learned weight, and that one's sum with a learned vector; and product and weight."""
    weight = None
    user = roles.sole_user(node)
    if user is not None and roles.op[user] == "mul":
        learned = [n for n in user.all_input_nodes if roles.sources[n] == {"parameter"}]
        if len(learned) == 1:
            node, weight, user = user, (user, learned[0]), roles.sole_user(user)
    return (user if user is not None and roles.op[user] == "add" and roles.bias_of(user) is not None else node), weight


def _between(x: fx.Node, output: fx.Node, roles: Roles) -> frozenset[fx.Node]:
    """The computing nodes that lead from ``x`` to ``output``, without both."""
    leads: dict[fx.Node, bool] = {x: True}

    def comes_from_x(node: fx.Node) -> bool:
        if node not in leads:
            comes = [comes_from_x(n) for n in node.all_input_nodes]
            leads[node] = any(comes)
        return leads[node]

    comes_from_x(output)
    return frozenset(node for node, comes in leads.items() if comes and node in roles.name and node not in (x, output))


def _source(node: fx.Node, roles: Roles) -> fx.Node:
    """The node whose values this one holds."""
    while roles.keeps_grid(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _up(node: fx.Node, roles: Roles) -> tuple[fx.Node, ...]:
    """The node and its source, past a reciprocal."""
    source = _source(node, roles)
    return (node, source, *source.all_input_nodes) if roles.op[source] == "reciprocal" else (node, source)
