"""The training form: values of the integer graph, gradients of the simulation.

Every forward builds the integer graph of the present weights and ranges, runs it, and then runs the simulation with each edge's value
replaced by the integer graph's (straight-through: the gradient is that of the floating-point op, at the integers' values). So what the
loss sees is what the integer graph gives, bit for bit, by construction: there is no second definition of the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from quantsim.kernels.edges import from_integers
from quantsim.numerics.affine import straight_through
from quantsim.rewrites.integer_only import Converted, ForceDequant, convert
from quantsim.rewrites.integer_only.builder import Tables


class IntegerOnlyTraining:
    """Called like the simulation's graph; returns the integer graph's outputs with the simulation's gradients.

    Dropout does nothing here: the integer graph has none. Costs the simulation's forward, the integer one's, and building that.

    Args:
        graph: simulated and calibrated; its weights and ranges are read anew at each call.
        force_dequant, kernel: as for :func:`integer_only`.
    """

    def __init__(self, graph: fx.GraphModule, force_dequant: ForceDequant = "none", *, kernel: bool = True) -> None:
        self.graph, self.force_dequant, self.kernel = graph, force_dequant, kernel
        self.kept: Tables = {}

    def __call__(self, **inputs: Tensor) -> Any:
        integers = convert(self.graph, self.force_dequant, self.kernel, tables=False, kept=self.kept)
        with torch.no_grad():
            recorder = _Recorder(integers)
            recorder.run(*_in_order(integers.graph, inputs))
        return _Replacing(self.graph, integers, recorder.seen).run(*_in_order(self.graph, inputs))


def _in_order(graph: fx.GraphModule, inputs: dict[str, Tensor]) -> list[Tensor | None]:
    return [inputs.get(str(node.target)) for node in graph.graph.find_nodes(op="placeholder")]


class _Recorder(fx.Interpreter):
    """Keeps the values of edges and outputs."""

    def __init__(self, integers: Converted) -> None:
        super().__init__(integers.graph)
        self.wanted = {edge.node for edge in integers.edges.values()} | set(integers.outputs.values())
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = value
        return value


class _Replacing(fx.Interpreter):
    """Runs the simulation; what an edge holds is replaced, and its gradient is not."""

    def __init__(self, graph: fx.GraphModule, integers: Converted, seen: dict[fx.Node, Tensor]) -> None:
        super().__init__(graph)
        self.integers, self.seen = integers, seen

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.Dropout):
            return self.env[n.args[0]]  # type: ignore[index]
        value = super().run_node(n)
        output, edge = self.integers.outputs.get(n.name), self.integers.edges.get(n.name)
        if output is not None:
            return straight_through(value, self.seen[output])
        if edge is not None and isinstance(value, Tensor):
            return straight_through(value, from_integers(self.seen[edge.node], edge.scale, edge.zero_point).to(value.dtype))
        return value
