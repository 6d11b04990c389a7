"""The coverage table: every quantizer, and every floating-point edge that has none, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tabulate import tabulate
from torch import Tensor, fx

from quantsim.graph.place import Placement
from quantsim.graph.roles import Roles, is_float
from quantsim.quantizers.fake_quantizer import FakeQuantizer


class CoveredEdge(NamedTuple):
    """One edge that computes, and how it is quantized.

    Attributes:
        name, op, role: the placement's.
        quantizer: bits, symmetry, axis and estimator; empty where there is none.
        state: the quantizer's, or ``"none"``.
        range: its calibrated range as text.
        reason: why there is no quantizer.
    """

    name: str
    op: str
    role: str
    quantizer: str
    state: str
    range: str
    reason: str


def covered_edges(placements: Sequence[Placement], quantizers: Mapping[str, FakeQuantizer]) -> list[CoveredEdge]:
    """A row for each edge that computes, in the order of the graph."""
    rows = []
    for p in placements:
        quantizer = quantizers.get(p.name) if p.spec else None
        state = quantizer.state.name.lower() if quantizer else "none"
        values = _range(quantizer) if quantizer and quantizer.calibrated else ""
        rows.append(CoveredEdge(p.name, p.op, p.role, str(p.spec) if p.spec else "", state, values, p.reason))
    return rows


def coverage_table(graph: fx.GraphModule, placements: Sequence[Placement], quantizers: Mapping[str, FakeQuantizer]) -> str:
    """A row for each edge that computes, then the edges that need no quantizer, counted by op."""
    rows = [(e.name, e.role, e.quantizer or "-", e.state, e.range or e.reason) for e in covered_edges(placements, quantizers)]
    table = tabulate(rows, headers=("edge", "role", "quantizer", "state", "range, or why there is none"), disable_numparse=True)
    return "\n".join([summary(placements), "", table, "", *inherited(graph)])


def summary(placements: Sequence[Placement]) -> str:
    """The counts, in a line."""
    named = {(p.name, p.role) for p in placements if p.spec}
    counts = Counter(role for _, role in named)
    left = sum(p.spec is None for p in placements)
    parts = [f"{counts[role]} {role} quantizers" for role in ("weight", "activation", "input") if counts[role]]
    return ", ".join([*parts, f"{left} edges left in floating point"])


def inherited(graph: fx.GraphModule) -> list[str]:
    """The edges that need no quantizer, counted by op: a line a kind."""
    roles = Roles(graph)
    keeping = Counter(roles.op[n] for n in roles.nodes if roles.keeps_grid(n) and _is_float_or_list(n))
    biases = {bias for n in roles.nodes if (bias := roles.bias_of(n))}
    lines = []
    if keeping:
        ops = ", ".join(f"{op} {count}" for op, count in keeping.most_common())
        lines.append(f"{keeping.total()} edges keep the grid of their input: {ops}")
    if biases:
        lines.append(f"{len(biases)} biases are not quantized: integer kernels add them in 32 bits")
    return lines


def _range(quantizer: FakeQuantizer) -> str:
    low, high = quantizer.min, quantizer.max
    if low.ndim == 0:
        return f"[{low.item():.4g}, {high.item():.4g}]"
    return f"{low.numel()} ranges in [{low.min().item():.4g}, {high.max().item():.4g}]"


def _is_float_or_list(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return is_float(node) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) and v.is_floating_point() for v in value))
