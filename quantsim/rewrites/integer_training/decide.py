"""Which ops are trained in integers: a graph and a config become a list that can be read, printed and tested."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx

from quantsim.config import ConfigError, near
from quantsim.graph.roles import KEEPS_GRID, Roles
from quantsim.graph.weights import weight_chains
from quantsim.rewrites.integer_training.config import IntegerConfig, Kind
from quantsim.rewrites.integer_training.convolution import convolution
from quantsim.rewrites.integer_training.embedding import embedding
from quantsim.rewrites.integer_training.layer_norm import layer_norm
from quantsim.rewrites.integer_training.products import addmm, linear, matmul, weight_on_the_right

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """The integer form of an op: a function of the op's arguments, those after ``takes`` being of no consequence."""

    kind: Kind
    function: Function
    takes: int


FORMS: dict[str, Form] = {
    "linear": Form("linear", linear, 3),
    "addmm": Form("linear", addmm, 3),
    "conv1d": Form("convolution", convolution, 7),
    "conv2d": Form("convolution", convolution, 7),
    "conv3d": Form("convolution", convolution, 7),
    "layer_norm": Form("layer_norm", layer_norm, 5),
    "embedding": Form("embedding", embedding, 3),
    "matmul": Form("matmul", matmul, 2),
}
WEIGHT_ON_THE_RIGHT = Form("linear", weight_on_the_right, 2)

WITHOUT_FORM: dict[str, Kind] = {
    "bilinear": "linear",
    "convolution": "convolution",
    "conv_transpose1d": "convolution",
    "conv_transpose2d": "convolution",
    "conv_transpose3d": "convolution",
    "native_layer_norm": "layer_norm",
    "embedding_bag": "embedding",
    "baddbmm": "matmul",
    "einsum": "matmul",
    "mv": "matmul",
    "dot": "matmul",
    "scaled_dot_product_attention": "matmul",
}
"""Ops of a kind that could be asked for, and that have no integer form here."""


@dataclass(frozen=True)
class Decision:
    """One op of the graph that computes, and whether it does so in integers.

    Attributes:
        node, name, op: as ``quantsim.graph.roles.Roles`` names them.
        form: its integer form; ``None`` leaves it in float.
        reason: why it does.
    """

    node: fx.Node
    name: str
    op: str
    form: Form | None
    reason: str = ""


def decide(graph: fx.GraphModule, config: IntegerConfig, roles: Roles | None = None) -> list[Decision]:
    """Every op that computes a floating-point tensor, in the order of the graph.

    Raises:
        ConfigError: a pattern of ``keep_float`` that matches nothing, or ops of a kind asked for that have no integer form.
    """
    roles = roles or Roles(graph)
    chains = weight_chains(roles)
    decisions = [_decide(node, name, roles, node in chains, config) for node, name in roles.name.items()]
    names = [d.name for d in decisions]
    for pattern in config.keep_float:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"keep_float: {pattern!r} matches no op; the nearest are {near(pattern, names)}")
    if lacking := [d for d in decisions if d.reason == NO_FORM]:
        ops = ", ".join(f"{d.name} ({d.op})" for d in lacking)
        raise ConfigError(f"no integer form for {ops}; leave them in float with keep_float=({lacking[0].name!r}, …)")
    return decisions


def decision_table(decisions: Iterable[Decision], config: IntegerConfig) -> str:
    """The list as text, the counts before it."""
    decisions = list(decisions)
    count = sum(d.form is not None for d in decisions)
    rows = [(d.name, d.op, "integers" if d.form else "float", d.form.kind if d.form else d.reason) for d in decisions]
    table = tabulate(rows, headers=("op", "aten", "computed in", "kind, or why in float"))
    return f"{count} ops in integers, {len(decisions) - count} in float; {config}\n\n{table}"


NO_FORM = "no integer form"


def _decide(node: fx.Node, name: str, roles: Roles, in_weight: bool, config: IntegerConfig) -> Decision:
    op = roles.op[node]

    def left(reason: str) -> Decision:
        return Decision(node, name, op, None, reason)

    form = _form_of(node, roles)
    kind = form.kind if form else WITHOUT_FORM.get(op)
    if kind is None:
        return left("not a kind of op that is trained in integers")
    if in_weight:
        return left("computes a weight from parameters: the FP32 master's side")
    for pattern in config.keep_float:
        if fnmatchcase(name, pattern):
            return left(f"keep_float has {pattern!r}")
    if kind not in config.ops:
        return left(f"ops has no {kind!r}")
    if form is None or not _takes(form, node):
        return left(NO_FORM)
    return Decision(node, name, op, form)


def _form_of(node: fx.Node, roles: Roles) -> Form | None:
    op = roles.op[node]
    if op == "matmul" and _is_weight(node.args[1], roles) and not _is_weight(node.args[0], roles):
        return WEIGHT_ON_THE_RIGHT
    return FORMS.get(op)


def _is_weight(node: Any, roles: Roles) -> bool:
    """A matrix that is a parameter, past ops that only move its values."""
    if not isinstance(node, fx.Node) or node.meta["val"].ndim != 2:
        return False
    while roles.op[node] in KEEPS_GRID:
        node = node.all_input_nodes[0]
    return node.op == "get_attr" and roles.sources[node] == {"parameter"}


def _takes(form: Form, node: fx.Node) -> bool:
    """The op has no argument that its integer form leaves out and that would change its value or gradient."""
    if form.kind == "embedding":  # weight, ids, padding_idx, scale_grad_by_freq, sparse
        return not any(node.args[3:])
    if form.kind == "matmul":
        return all(isinstance(x, fx.Node) and x.meta["val"].ndim >= 2 for x in node.args[:2])
    if form.kind == "convolution" and node.args[0].meta["val"].ndim != node.args[1].meta["val"].ndim:  # type: ignore[union-attr]
        return False  # no batch
    if form.function is addmm and (not isinstance(node.args[0], fx.Node) or node.args[0].meta["val"].shape != node.meta["val"].shape[-1:]):
        return False  # a bias that is broadcast otherwise than a linear's
    return not node.kwargs  # beta and alpha of addmm
