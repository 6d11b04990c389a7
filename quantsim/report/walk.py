"""A graph that runs node by node, with a choice of its quantizers, and can branch off at any node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from quantsim.quantizers.exact_op import ExactOp
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.quantizers.in_graph import quantizer_of

Batch = Mapping[str, Tensor]
Chooses = Callable[[str], bool]
"""Whether the quantizer of this name quantizes."""


def everyone(_: str) -> bool:
    """All quantizers quantize."""
    return True


def nobody(_: str) -> bool:
    """No quantizer quantizes: the floating-point model (a clamped mask stays clamped)."""
    return False


class Walk(fx.Interpreter):
    """One batch on its way through a graph.

    Values that no later node reads are let go, so what is held is what is alive. Quantizers that are not chosen, or not
    calibrated, pass on what comes in; no quantizer overwrites it, and no state of any is changed.

    Args:
        graph: simulated; in eval mode, see :func:`evaluating`.
        batch: inputs by keyword; names that the graph doesn't take (labels) are ignored.
        chosen: which quantizers quantize.

    Attributes:
        position: of the node that runs next.
    """

    def __init__(self, graph: fx.GraphModule, batch: Batch, chosen: Chooses = everyone) -> None:
        super().__init__(graph)
        self.batch, self.chosen = batch, chosen
        self.nodes = list(graph.graph.nodes)
        self.position = 0
        self.mutates = any(_mutates(node) for node in self.nodes)

    def step(self) -> tuple[fx.Node, Any]:
        """Run the next node; it and its value."""
        node = self.nodes[self.position]
        value = self.env[node] = self.run_node(node)
        for unread in self.user_to_last_uses.get(node, ()):
            del self.env[unread]
        self.position += 1
        return node, value

    def advance(self, position: int) -> None:
        """Run until the node at ``position`` is the next one."""
        while self.position < position:
            self.step()

    def finish(self) -> dict[str, Tensor]:
        """Run what is left; the floating-point outputs by name (by number, where the model gives a tuple)."""
        self.advance(len(self.nodes) - 1)
        output = self.step()[1]
        named = output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, (tuple, list)) else [output])
        return {str(name): x for name, x in named if isinstance(x, Tensor) and x.is_floating_point()}

    def branch(self, chosen: Chooses) -> Self:
        """Another walk from here on with other quantizers. Where ops of the graph write into tensors, it starts at the beginning."""
        new = copy.copy(self)
        new.chosen = chosen
        new.env, new.position = ({}, 0) if self.mutates else (dict(self.env), self.position)
        return new

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.batch:
            return self.batch[target]
        if args:
            return args[0]
        raise ValueError(f"the batch holds {', '.join(self.batch)}; the model also needs {target!r}")

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, ExactOp) and not all(map(self._quantizes, module.quantizers)):
            return module.in_float(*args)
        if not isinstance(module, FakeQuantizer):
            return super().call_module(target, args, kwargs)
        x: Tensor = args[0]
        if not self._quantizes(module):
            return x
        return module(x if isinstance(x, nn.Parameter) else x.clone())  # it may overwrite what it is given

    def _quantizes(self, quantizer: FakeQuantizer) -> bool:
        return quantizer.calibrated and self.chosen(quantizer.name)


@torch.no_grad()
def outputs_of(graph: fx.GraphModule, batches: Iterable[Batch], chosen: Chooses = everyone) -> list[dict[str, Tensor]]:
    """The floating-point outputs of every batch, with the chosen quantizers."""
    with evaluating(graph):
        return [Walk(graph, batch, chosen).finish() for batch in batches]


def quantizers_of(graph: fx.GraphModule) -> dict[str, int]:
    """Every quantizer that the graph calls, in order, and the position of the node that first calls it."""
    found: dict[str, int] = {}
    for position, node in enumerate(graph.graph.nodes):
        if quantizer := quantizer_of(node, graph):
            found.setdefault(quantizer.name, position)
    return found


@contextmanager
def evaluating(graph: fx.GraphModule) -> Iterator[None]:
    """Eval mode inside the ``with`` block, then every module's own mode again (weights that were quantized once stay so)."""
    training = [module for module in graph.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
