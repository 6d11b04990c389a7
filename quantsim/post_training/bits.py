"""Mixed precision by search: which activations to give more bits, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import fx

from quantsim.config import MAX_BITS, MIN_BITS, ConfigError, Rule
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State, WeightQuantizer
from quantsim.report.sensitivity import Metric, outputs_sqnr, sensitivity
from quantsim.report.walk import Batch, nobody, outputs_of


@torch.no_grad()
def search_bits(
    graph: fx.GraphModule,
    quantizers: Mapping[str, FakeQuantizer],
    batches: Sequence[Batch],
    *,
    edges: int | None = None,
    average: float | None = None,
    bits: int = 16,
    metric: Metric | None = None,
) -> tuple[Rule, ...]:
    """Rules that give ``bits`` to the activations that gain most by it, the greatest gain first.

    Greedy: the edge that raises the metric most is taken, then the one that raises it most beside that, until the budget is spent or
    none raises it. While it searches, an edge with more bits is one in floating point; at 16 bits no difference is to be seen. An
    edge's gain is measured again only when it leads by what was measured last (lazy greedy; Minoux, 1978), for most gains shrink as
    other edges are taken.

    Args:
        graph: of a calibrated simulation, which is not changed.
        quantizers: its quantizers by name; weights are no candidates, nor what has so many bits already.
        batches: few rows are enough for the default metric.
        edges: how many edges are taken at most.
        average: or, the most that the mean width of all activations may be, each edge counted once.
        bits: what an edge gets.
        metric: greater is better; by default the SQNR of the outputs against the floating-point model, in dB.

    Raises:
        ConfigError: not one budget, or one that means nothing.
        ValueError: no batches.
    """
    widths = {name: q.spec.bits for name, q in quantizers.items() if q.calibrated and not isinstance(q, WeightQuantizer)}
    fits = _budget(widths, edges, average, bits)
    metric = metric or outputs_sqnr(outputs_of(graph, batches, nobody))
    taken: list[str] = []
    with _states_kept([quantizers[name] for name in widths]):
        score = metric(outputs_of(graph, batches), batches)
        candidates = [name for name, width in widths.items() if width < bits]
        gains = {name: (found - score, 0) for name, found in sensitivity(graph, batches, "alone_off", metric, candidates)}
        while gains:
            best = max(gains, key=lambda name: gains[name][0])
            gain, measured_beside = gains[best]
            if gain <= 0:
                break
            if not fits([*taken, best]):
                del gains[best]
            elif measured_beside < len(taken):
                ((_, found),) = sensitivity(graph, batches, "alone_off", metric, [best])
                gains[best] = (found - score, len(taken))
            else:
                del gains[best]
                taken.append(best)
                score += gain
                quantizers[best].state = State.OFF
    return tuple(Rule(module=name, set={"bits": bits}) for name in taken)


def _budget(widths: Mapping[str, int], edges: int | None, average: float | None, bits: int) -> Callable[[Sequence[str]], bool]:
    """Says of a choice of edges if it is within the budget."""
    if not MIN_BITS < bits <= MAX_BITS:
        raise ConfigError(f"bits: {bits!r}; expected {MIN_BITS + 1} to {MAX_BITS}")
    if (edges is None) == (average is None):
        raise ConfigError(f"edges: {edges!r} and average: {average!r}; expected one of the two as the budget")
    if not widths:
        raise ConfigError("no activation has a calibrated quantizer; call compute_encodings first")
    if edges is not None:
        if edges < 1:
            raise ConfigError(f"edges: {edges!r}; expected 1 or more")
        return lambda taken: len(taken) <= edges
    assert average is not None
    least = sum(widths.values()) / len(widths)
    if average < least:
        raise ConfigError(f"average: {average!r} bits; the activations have {least:.2f} as they are")
    return lambda taken: sum(bits if name in taken else width for name, width in widths.items()) <= average * len(widths)


@contextmanager
def _states_kept(quantizers: Iterable[FakeQuantizer]) -> Iterator[None]:
    states = {q: q.state for q in quantizers}
    try:
        yield
    finally:
        for quantizer, state in states.items():
            quantizer.state = state
