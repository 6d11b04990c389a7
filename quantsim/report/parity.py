"""A simulation and its lowered form, compared edge by edge on real batches."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from quantsim.kernels.edges import EDGE, on_grid, to_integers
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.numerics.affine import dequantize, quantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer


@dataclass
class EdgeParity:
    """One quantized edge, over all batches.

    Attributes:
        name: the placement's.
        values: how many were compared.
        largest_difference: between the two graphs before requantization, in steps of the edge's grid; ``nan`` where the
            lowered graph never has the value (a table, an attention of integers).
        off_by_one, off_by_more: requantized values that are one step apart, and more than one.
    """

    name: str
    values: int = 0
    largest_difference: float = 0.0
    off_by_one: int = 0
    off_by_more: int = 0


@dataclass
class Parity:
    """What :func:`compare_lowered` found.

    Attributes:
        edges: every quantized activation edge that both graphs have, in the order of the simulated graph.
        logits_difference: the largest difference of the first output, the graphs running freely.
        rows, differing_rows: rows compared, and those whose largest output (of a token, where tokens have outputs) is another one.
        largest_margin: over the differing rows, the largest gap between the two outputs that changed places.
        noise, noisy_rows: the largest difference of the logits between two lowerings of the same simulation, and the rows in which
            they predict otherwise; ``None`` where none was given.
    """

    edges: list[EdgeParity] = field(default_factory=list)
    logits_difference: float = 0.0
    rows: int = 0
    differing_rows: int = 0
    largest_margin: float = 0.0
    noise: float | None = None
    noisy_rows: int = 0

    @property
    def holds(self) -> bool:
        """No requantized value is off by more than a step."""
        return not any(edge.off_by_more for edge in self.edges)

    def __str__(self) -> str:
        rows = [(e.name, e.values, f"{e.largest_difference:.2e}", e.off_by_one, e.off_by_more) for e in self.edges]
        table = tabulate(rows, headers=("edge", "values", "largest difference, steps", "off by one", "off by more"))
        off, more, values = (sum(getattr(e, name) for e in self.edges) for name in ("off_by_one", "off_by_more", "values"))
        lines = [
            f"{len(self.edges)} edges, {values:,} values: {off} off by one step, {more} off by more",
            f"running freely: largest difference of the outputs {self.logits_difference:.2e}; "
            f"{self.differing_rows} of {self.rows} rows predict otherwise"
            + (f", the margin of their outputs at most {self.largest_margin:.2e}" if self.differing_rows else ""),
        ]
        if self.noise is not None:
            lines.append(
                f"requantization noise (the same integers, products in float32): largest difference {self.noise:.2e}, "
                f"{self.noisy_rows} rows predict otherwise"
            )
        return "\n".join([table, "", *lines])


@torch.inference_mode()
def compare_lowered(
    simulated: fx.GraphModule, lowered: fx.GraphModule, batches: Iterable[Mapping[str, Tensor]], other: fx.GraphModule | None = None
) -> Parity:
    """Walk both graphs over ``batches``.

    Each edge of the lowered graph is computed from the *simulated* integers of the edges before it, so that one flipped value
    doesn't show in every edge after it: a difference belongs to the edge that it is reported for. Then both run freely, for
    logits and predictions.

    A value within a float's rounding of a tie falls to either side of it, and what follows may amplify that step. ``other``, a
    second lowering of the same simulation (``lower_int8(..., packs=False)``), tells how much: both compute the same integers,
    so their difference is the noise that no comparison of two float computations can go below.

    >>> from quantsim import QuantSim
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> sim = QuantSim(BertForSequenceClassification(config).eval())
    >>> batch = {"input_ids": torch.randint(0, 99, (4, 10))}
    >>> sim.compute_encodings([batch])
    >>> compare_lowered(sim.graph, sim.lower().graph, [batch]).holds
    True
    """
    parity, edges = Parity(), dict[str, EdgeParity]()
    inputs = [str(node.target) for node in simulated.graph.find_nodes(op="placeholder")]
    for batch in batches:
        arguments = [batch.get(name) for name in inputs]
        walk = _SimulatedWalk(simulated)
        expected = _first(walk.run(*arguments))
        _LoweredWalk(lowered, walk.before, edges).run(*arguments)
        taken = {name: x for name, x in batch.items() if name in inputs}
        free = _first(lowered(**taken))
        _compare_outputs(parity, expected, free)
        if other is not None:
            again = _first(other(**taken))
            parity.noise = max(parity.noise or 0.0, (free - again).abs().max().item())
            parity.noisy_rows += _count_rows(free.argmax(-1) != again.argmax(-1))
    order = {name: i for i, name in enumerate(q.name for q in _quantizers(simulated))}
    parity.edges = sorted(edges.values(), key=lambda edge: order[edge.name])
    return parity


def _quantizers(graph: fx.GraphModule) -> list[FakeQuantizer]:
    modules = [graph.get_submodule(str(node.target)) for node in graph.graph.find_nodes(op="call_module")]
    return [m for m in modules if isinstance(m, FakeQuantizer) and not isinstance(m, WeightQuantizer)]


def _first(output: Any) -> Tensor:
    return next(x for x in output.values() if isinstance(x, Tensor)) if isinstance(output, Mapping) else output[0]


def _compare_outputs(parity: Parity, expected: Tensor, found: Tensor) -> None:
    parity.rows += len(expected)
    parity.logits_difference = max(parity.logits_difference, (expected - found).abs().max().item())
    if expected.ndim < 2:
        return
    ours, theirs = expected.argmax(-1, keepdim=True), found.argmax(-1, keepdim=True)
    differs = (ours != theirs).squeeze(-1)  # [rows], or [rows, tokens]
    parity.differing_rows += _count_rows(differs)
    if differs.any():
        margins = (expected.gather(-1, ours) - expected.gather(-1, theirs))[differs]
        parity.largest_margin = max(parity.largest_margin, margins.max().item())


def _count_rows(differs: Tensor) -> int:
    """How many rows hold a difference, of ``[rows, ...]``."""
    return int(differs.reshape(len(differs), -1).any(1).sum()) if differs.ndim else 0


class _SimulatedWalk(fx.Interpreter):
    """Runs the simulated graph and keeps what went into each activation quantizer."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.before: dict[str, tuple[Tensor, FakeQuantizer]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(str(target))
        if not isinstance(module, FakeQuantizer) or isinstance(module, WeightQuantizer):
            return super().call_module(target, args, kwargs)
        self.before[module.name] = (args[0].clone(), module)
        return module(args[0].clone())  # a quantizer may overwrite what it is given


class _LoweredWalk(fx.Interpreter):
    """Runs the lowered graph; compares each edge with the simulated one, and goes on with the simulated integers."""

    def __init__(self, graph: fx.GraphModule, simulated: Mapping[str, tuple[Tensor, FakeQuantizer]], edges: dict[str, EdgeParity]) -> None:
        super().__init__(graph)
        self.simulated, self.edges = simulated, edges
        self.unrequantized: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and isinstance(module := self.fetch_attr(str(n.target)), Int8Linear):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.unrequantized[n] = module.in_float(*args)
        value = super().run_node(n)
        found = self.simulated.get(n.meta.get(EDGE, ""))
        if found is None or not isinstance(value, Tensor):
            return value
        expected, quantizer = found
        return self._compare(n, value, expected, quantizer)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(self.fetch_attr(str(target)), FakeQuantizer):
            args = (args[0].clone(),)  # it may overwrite what it is given, which is compared afterwards
        return super().call_module(target, args, kwargs)

    def _compare(self, n: fx.Node, value: Tensor, before: Tensor, quantizer: FakeQuantizer) -> Tensor:
        params = quantizer.affine_params()
        expected = quantize(before, params)
        integers = value.int() if not value.is_floating_point() else quantize(value, params)
        edge = self.edges.setdefault(quantizer.name, EdgeParity(quantizer.name))
        off = (integers - expected).abs()
        edge.values += off.numel()
        edge.off_by_one += int((off == 1).sum())
        edge.off_by_more += int((off > 1).sum())
        own = self._before(n)
        steps = float("nan") if own is None else ((own - before).abs() / params.broadcast(params.scale, before.ndim)).max().item()
        edge.largest_difference = steps if steps != steps else max(edge.largest_difference, steps)
        return expected.to(value.dtype) if not value.is_floating_point() else dequantize(expected, params).to(value.dtype)

    def _before(self, n: fx.Node) -> Tensor | None:
        """What the lowered graph had before it requantized; ``None`` where it never had it."""
        if n in self.unrequantized:
            return self.unrequantized[n]
        source = n.args[0]
        assert isinstance(source, fx.Node)
        if n.target in (to_integers, on_grid) or (n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), FakeQuantizer)):
            value = self.env[source]
            return value if isinstance(value, Tensor) else None
        if n.target is operator.getitem:  # one of the layers in a product
            whole = source.args[0]
            assert isinstance(whole, fx.Node)
            pieces = torch.split_with_sizes(self.unrequantized[whole], source.args[1], -1)  # type: ignore[arg-type]
            return pieces[int(n.args[1])]  # type: ignore[arg-type]
        return None
