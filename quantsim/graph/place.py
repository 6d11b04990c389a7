"""Where quantizers go: a graph and a config become a list that can be read, printed and tested. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, fx

from quantsim.config import ConfigError, QuantConfig, QuantSpec, Role, Rule, near
from quantsim.graph.norms import find_norms
from quantsim.graph.roles import HIDDEN, Roles, is_float
from quantsim.graph.weights import AT_OUTPUT, weight_chains, weight_edges

FROM_IDS = "made of ids, sizes and constants alone"
UNSCALED = "scaled back channel by channel, for an op that reads it so"


@dataclass(frozen=True)
class Placement:
    """One edge of the graph, and how it is quantized.

    Attributes:
        node: the node that makes the edge, or for a weight the node that takes it.
        edge: ``"output"``, or which argument of the node.
        weight: for a weight the node that makes it.
        readers: the only ops that read it quantized; empty: all.
        name: the module's path and what it is (``bert.pooler.dense.weight``, ``bert.encoder.layer.0.attention.self.softmax``).
        op, role: what rules match.
        spec: ``None`` leaves the edge in floating point.
        reason: why it does.
        usual: the spec that a rule gives it which switches it on again; ``None``: the config's.
        attention: what ``Roles`` finds of the node, in an attention or of the residual stream; rules match it as they do ``op``.
    """

    node: fx.Node
    edge: int | Literal["output"]
    name: str
    op: str
    role: Role
    spec: QuantSpec | None
    reason: str = ""
    attention: str | None = None
    weight: fx.Node | None = None
    readers: tuple[str, ...] = ()
    usual: QuantSpec | None = None


def place(graph: fx.GraphModule, config: QuantConfig, roles: Roles | None = None) -> list[Placement]:
    """Every floating-point edge that computes something, in the order of the graph: quantized, or not and why.

    Raises:
        ConfigError: a rule that is not optional matches nothing, or there is no op of a name in ``activations_before`` or
            ``supergroups``; the message names the nearest.
    """
    roles = roles or Roles(graph)
    _check_ops(config, roles)
    placements = _inside_supergroups(list(_candidates(roles, config)), roles, config)
    matched: set[Rule] = set()
    decided = [_decide(p, config, matched) for p in placements]
    for rule in config.rules:
        if rule not in matched and not rule.optional:
            raise ConfigError(f"{rule} matches nothing; {_nearest(rule, placements)}")
    return _one_spec_per_weight(decided)


def _check_ops(config: QuantConfig, roles: Roles) -> None:
    """Names of no op, of the graph or of torch, are mistyped."""
    there = set(roles.op.values())
    for field, names in (("activations_before", config.activations_before), *(("supergroups", group) for group in config.supergroups)):
        for name in names:
            if name not in there and not hasattr(torch.ops.aten, name):
                raise ConfigError(f"{field}: {name!r} is no op; the nearest of the graph are {near(name, there)}")


def _candidates(roles: Roles, config: QuantConfig) -> Iterable[Placement]:
    norms = find_norms(roles)
    in_weights = weight_chains(roles, norms)
    weights = weight_edges(roles, norms, in_weights)
    inside = {node: f"inside a {norm.kind} that runs as one" for norm in norms for node in norm.inside}
    kinds = {norm.output: norm.kind for norm in norms}
    for node in roles.nodes:
        op = roles.op[node]
        if node.op == "placeholder" and is_float(node):
            spec = config.activations if config.inputs else None
            yield Placement(node, "output", node.name, op, "input", spec, "" if spec else "inputs are left as they are")
        for e in weights.get(node, []):
            spec, reason = config.weights, "" if config.weights else "weights are left as they are"
            if spec is not None and spec.axis is not None:  # a vector has one range: a range for each number would quantize nothing
                spec = replace(spec, axis=e.axis)
            usual = spec or replace(QuantSpec(), axis=None)
            if spec is not None and op in AT_OUTPUT:
                spec, reason = None, f"quantized with the output of {op}"
            yield Placement(e.node, e.index, e.name, e.op, "weight", spec, reason, weight=e.weight, usual=usual)
        if node in roles.name and node not in in_weights:
            spec, reason = config.activations, "" if config.activations else "activations are left as they are"
            readers: tuple[str, ...] = config.activations_before if config.float_elsewhere else ()
            if roles.from_ids_alone(node):
                spec, reason = None, FROM_IDS
            elif spec is not None and node in inside:
                spec, reason = None, inside[node]
            elif spec is not None and roles.role.get(node) == HIDDEN:
                spec, reason = None, "some of its values are hidden behind a large number"
            elif roles.unscales(node):
                spec, reason = None, UNSCALED
            elif spec is not None and config.activations_before and not roles.is_read_by(node, config.activations_before):
                spec, reason = None, f"no {' or '.join(config.activations_before)} reads it"
            yield Placement(
                node, "output", roles.name[node], kinds.get(node, op), "activation", spec, reason, roles.role.get(node), None, readers
            )


def _inside_supergroups(placements: list[Placement], roles: Roles, config: QuantConfig) -> list[Placement]:
    """Switch off the edges between ops that run as one."""
    fused: dict[fx.Node, str] = {}
    for group in config.supergroups:
        for node in roles.nodes:
            chain = [node]
            while len(chain) < len(group) and roles.op[chain[-1]] == group[len(chain) - 1]:
                user = roles.sole_user(chain[-1])
                if user is None:
                    break
                chain.append(user)
            if len(chain) == len(group) and roles.op[chain[-1]] == group[-1]:
                fused |= dict.fromkeys(chain[:-1], f"runs as one with {group[-1]}")
    return [replace(p, spec=None, reason=fused[p.node]) if p.edge == "output" and p.node in fused else p for p in placements]


def _decide(placement: Placement, config: QuantConfig, matched: set[Rule]) -> Placement:
    spec, reason, readers, usual = placement.spec, placement.reason, placement.readers, placement.usual
    if reason in (FROM_IDS, UNSCALED):
        return placement
    for rule in config.rules:
        if not _matches(rule, placement):
            continue
        matched.add(rule)
        if rule.enabled is False:
            spec, reason = None, rule.reason or f"off by {rule}"
        elif rule.enabled is True and spec is None:
            spec, reason = usual or config.activations or QuantSpec(), ""
            readers = ()
        if usual is not None:  # what rules set stays, whether the edge is on at that time or not
            usual = rule.apply(usual)
        if spec is not None:
            spec = rule.apply(spec)
    if spec is not None and spec.axis is not None:
        _check_axis(spec, placement)
    elif spec is not None and spec.groups is not None:
        raise ConfigError(f"{placement.name}: {spec.groups} groups and no axis that they lie along; set axis too, as axis=-1")
    return replace(placement, spec=spec, reason=reason, readers=readers if spec else ())


def _check_axis(spec: QuantSpec, placement: Placement) -> None:
    value = (placement.weight or placement.node).meta["val"]
    assert isinstance(value, Tensor)
    assert spec.axis is not None
    if not -value.ndim <= spec.axis < value.ndim:
        raise ConfigError(f"{placement.name}: axis {spec.axis} of a tensor with {value.ndim} axes")
    if not isinstance(value.shape[spec.axis], int):
        raise ConfigError(f"{placement.name}: axis {spec.axis} has no fixed size (batch or sequence), so it can't keep ranges of its own")
    if spec.groups is not None and (placement.role == "weight" or spec.groups > value.shape[spec.axis]):
        raise ConfigError(
            f"{placement.name}: {spec.groups} groups; expected at most as many as axis {spec.axis} is long, {value.shape[spec.axis]}, "
            "and none for a weight, which has a range for each channel"
        )


def _matches(rule: Rule, placement: Placement) -> bool:
    if rule.role is not None and rule.role != placement.role:
        return False
    if rule.module is not None and not fnmatchcase(placement.name, rule.module):
        return False
    return rule.op is None or any(fnmatchcase(kind, rule.op) for kind in (placement.op, placement.attention) if kind)


def _nearest(rule: Rule, placements: Sequence[Placement]) -> str:
    if rule.module is not None:
        return f"the nearest edges are {near(rule.module, [p.name for p in placements])}"
    if rule.op is not None:
        kinds = {kind for p in placements for kind in (p.op, p.attention) if kind}
        return f"the nearest ops are {near(rule.op, kinds)}; this graph has {', '.join(sorted(kinds))}"
    return f"this graph has no edge of role {rule.role}"


def _one_spec_per_weight(placements: list[Placement]) -> list[Placement]:
    """A parameter that is used twice (a tied decoder) has one quantizer: of channels where one asks for them, with the most bits."""
    asked: dict[str, list[QuantSpec]] = {}
    for p in placements:
        if p.role == "weight" and p.spec is not None:
            asked.setdefault(p.name, []).append(p.spec)
    finest = {
        name: replace(next((spec for spec in specs if spec.axis is not None), specs[0]), bits=max(spec.bits for spec in specs))
        for name, specs in asked.items()
    }
    return [replace(p, spec=finest[p.name]) if p.role == "weight" and p.spec is not None else p for p in placements]
