"""What an integer graph computes with: every op by name and width, and the proof that no float is among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES, from_integers, look_up
from quantsim.kernels.int8_matmul import affine_matmul, int8_matmul
from quantsim.numerics.dyadic import rescale, rescale_channels
from quantsim.numerics.polynomial import i_gelu, i_normalize, i_softmax, i_tanh
from quantsim.report.lowering import stored_bytes

WIDTHS = {
    int8_matmul: "8 × 8, summed in 32",
    affine_matmul: "8 × 8, summed in 32, zero points in 32",
    rescale_channels: "64: int32 times a multiplier a channel",
    i_normalize: "64: a sum of squares",
    i_softmax: "32; the sum of a row in 64",
    i_gelu: "32",
    i_tanh: "32",
    look_up: "table",
}


class FloatUse(NamedTuple):
    """A place where an integer graph computes with floating-point numbers."""

    node: str
    op: str
    what: str


def find_floats(graph: fx.GraphModule, batch: Mapping[str, Tensor]) -> list[FloatUse]:
    """Run the graph on a batch and list every floating-point tensor and number that any operator in it takes or gives.

    Every ATen operator is looked at, those inside functions that the graph calls too. What the last dequantization gives, before the
    model's outputs, is left out: ``from_integers`` that nothing but the output reads. An empty list is the proof for this batch; which
    operators run doesn't depend on it.
    """
    walk = _Walk(graph)
    with torch.no_grad():
        walk.run(*[batch.get(str(node.target)) for node in graph.graph.find_nodes(op="placeholder")])
    return list(dict.fromkeys(walk.found))


def is_final(node: fx.Node) -> bool:
    """The node dequantizes an output of the model."""
    return node.target is from_integers and all(_is_output(user) for user in node.users)


def _is_output(node: fx.Node) -> bool:
    return node.op == "output" or isinstance(node.target, type)


class _Walk(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: list[FloatUse] = []

    def run_node(self, n: fx.Node) -> Any:
        if _is_output(n) or is_final(n):
            return super().run_node(n)
        with _Watch(n, self.found):
            value = super().run_node(n)
        if _has_float(value):
            self.found.append(FloatUse(n.name, str(n.target), "gives a floating-point tensor"))
        return value


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operator that takes or gives floats."""

    def __init__(self, node: fx.Node, found: list[FloatUse]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node, self.found = node, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for what, values in (("takes", (args, kwargs)), ("gives", out)):
            if _has_float(values):
                self.found.append(FloatUse(self.node.name, str(func), f"{what} floating-point numbers"))
        return out


def _has_float(values: Any) -> bool:
    return any(isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) for x in pytree.tree_leaves(values))


def integer_table(graph: fx.GraphModule) -> str:
    """A line an op that computes: what for, how wide its arithmetic is, and the type that it gives; counts above."""
    rows = [
        (node.meta.get(COMPUTES, node.name), op_of(node, graph), _width(node), _gives(node))
        for node in graph.graph.nodes
        if node.op == "call_function" and (node.target in WIDTHS or node.target is rescale or is_final(node))
    ]
    counts = Counter(row[1] for row in rows)
    wide = sum(row[2].startswith("64") for row in rows)
    lines = [", ".join(f"{count} {op}" for op, count in counts.most_common())]
    lines.append(f"{wide} of {len(rows)} ops compute in 64 bits; weights and constants: {stored_bytes(graph) / 1e6:.1f} MB")
    return "\n".join([*lines, "", tabulate(rows, headers=("edge", "op", "bits", "gives"), disable_numparse=True)])


def _width(node: fx.Node) -> str:
    if node.target is rescale:
        return "64: int32 times a multiplier" if node.args[3] else "32"
    return WIDTHS.get(node.target, "dequantized: an output")  # type: ignore[arg-type]


def _gives(node: fx.Node) -> str:
    if node.target is from_integers:
        return "float32"
    dtype = node.args[-1] if node.target is rescale_channels else node.kwargs.get("dtype", torch.int32)
    return "8 bits" if node.target is look_up else str(dtype).removeprefix("torch.")
