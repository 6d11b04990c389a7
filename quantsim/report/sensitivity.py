"""What each quantizer costs the model: alone on in the floating-point model, and alone off in the quantized one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from quantsim.config import near
from quantsim.numerics.sqnr import Noise
from quantsim.report.walk import Batch, Chooses, Walk, evaluating, everyone, nobody, outputs_of, quantizers_of

Outputs = Mapping[str, Tensor]
Metric = Callable[[Sequence[Outputs], Sequence[Batch]], float]
"""A score of the floating-point outputs of each batch, by name, beside the batches, labels included; greater is better."""

Mode = Literal["alone_on", "alone_off"]


@torch.no_grad()
def sensitivity(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    mode: Mode,
    metric: Metric | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, float]]:
    """The score of the model with one quantizer alone on, or alone off, for each quantizer in the order of the graph.

    The batches walk through the graph once, together; where a quantizer stands, a branch goes on with that one switched and the
    walk goes on without, so no work before it is done twice: half the passes' time, and the memory of what is alive.
    Results come one at a time. Nothing of the model is changed, also where the caller stops early.

    Args:
        graph: simulated and calibrated (``sim.graph``).
        batches: few rows are enough to rank quantizers by the outputs' SQNR; a metric in steps of a row needs many.
        mode: ``"alone_on"``: this one quantizes and no other (how much it hurts by itself); ``"alone_off"``: all others that are
            calibrated do (how much leaving it in floating point would bring back).
        metric: of the outputs; by default their SQNR in dB against the floating-point model (:func:`outputs_sqnr`).
        names: only these quantizers.

    Yields:
        a quantizer's name and the score.

    Raises:
        ValueError: no batches, or a name that no calibrated quantizer has.

    >>> from quantsim import QuantSim
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> sim = QuantSim(BertForSequenceClassification(config).eval())
    >>> batch = {"input_ids": torch.randint(0, 99, (4, 10))}
    >>> sim.compute_encodings([batch])
    >>> scores = dict(sensitivity(sim.graph, [batch], "alone_on"))
    >>> set(scores) == set(sim.quantizers)
    True
    """
    positions = _positions(graph, batches, names)
    metric = metric or outputs_sqnr(outputs_of(graph, batches, nobody))
    walks = [Walk(graph, batch, nobody if mode == "alone_on" else everyone) for batch in batches]
    for name, position in positions.items():
        with evaluating(graph):
            for walk in walks:
                walk.advance(position)
            outputs = [walk.branch(_switched(name, mode)).finish() for walk in walks]
        yield name, metric(outputs, batches)


def outputs_sqnr(reference: Sequence[Outputs]) -> Metric:
    """The metric that compares outputs with these: the SQNR of :func:`outputs_noise`, in dB."""

    def metric(outputs: Sequence[Outputs], batches: Sequence[Batch]) -> float:
        return outputs_noise(reference, outputs, batches).db

    return metric


def outputs_noise(reference: Sequence[Outputs], outputs: Sequence[Outputs], batches: Sequence[Batch]) -> Noise:
    """The signal and the noise of all outputs of all batches, without positions that ``attention_mask`` pads."""
    total = Noise()
    for ours, theirs, batch in zip(reference, outputs, batches, strict=True):
        for name, y in ours.items():
            total += Noise.between(_without_padding(y, batch), _without_padding(theirs[name], batch))
    return total


@torch.no_grad()
def estimate_seconds(graph: fx.GraphModule, batches: Sequence[Batch], names: Collection[str] | None = None) -> float:
    """How long :func:`sensitivity` will take in one mode: what follows each quantizer in a timed pass of the first batch, summed."""
    positions = _positions(graph, batches, names)
    with evaluating(graph):
        walk, ends = Walk(graph, batches[0], nobody), [time.perf_counter()]
        for _ in walk.nodes:
            walk.step()
            ends.append(time.perf_counter())
    rows = [len(next(iter(batch.values()))) for batch in batches]
    after = (ends[-1] - ends[0 if walk.mutates else position] for position in positions.values())
    return sum(after) * sum(rows) / rows[0]


def _positions(graph: fx.GraphModule, batches: Sequence[Batch], names: Collection[str] | None) -> dict[str, int]:
    if not batches:
        raise ValueError("sensitivity: no batches; a DataLoader or generator that was used up before gives none")
    positions = quantizers_of(graph)
    for name in names or ():
        if name not in positions:
            raise ValueError(f"sensitivity: no quantizer {name!r}; the nearest are {near(name, positions)}")
    return {name: at for name, at in positions.items() if names is None or name in names}


def _switched(name: str, mode: Mode) -> Chooses:
    return (lambda other: other == name) if mode == "alone_on" else (lambda other: other != name)


def _without_padding(x: Tensor, batch: Batch) -> Tensor:
    """``[rows, tokens, ...] -> [tokens that are not padded, ...]``; an output without a token axis is left as it is."""
    mask = batch.get("attention_mask")
    return x[mask.bool()] if mask is not None and mask.ndim > 1 and x.shape[: mask.ndim] == mask.shape else x
