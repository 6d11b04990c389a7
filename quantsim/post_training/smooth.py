"""Outliers out of activations and into weights, as far as the weights bear it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from quantsim.report.walk import Batch, Walk, evaluating, nobody
from quantsim.rewrites.scale_channels import Stream, find_streams, fold, read_columns


@torch.no_grad()
def smooth(graph: fx.GraphModule, batches: Sequence[Batch], alpha: float) -> None:
    """Scale every stream of the graph by :func:`scales`; what the graph computes in floating point stays as it is, to the bit.

    Done twice on the same batches, the second time changes nothing but what rounding to powers of 2 left.

    Args:
        graph: with the products of ``unscale_reads`` in it.
        batches: whose activations are smoothed.
        alpha: from 0, weights as flat as can be, to 1, activations.
    """
    streams = find_streams(graph)
    largest = _largest(graph, batches, streams)
    for stream in streams:
        activations = torch.stack([largest[edge] for edge in stream.edges]).amax(0)
        fold(graph, stream, scales(activations, read_columns(graph, stream), alpha))


def scales(activations: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """What each channel is divided by::

        s_j = max |x_j| ** alpha / max |w_j| ** (1 - alpha)

    (Xiao et al., SmoothQuant, 2023, eq. 4), over its geometric mean, rounded to a power of 2 so that no float is rounded when it is
    scaled. A channel that is always 0, or that no weight reads, counts as the smallest that is not.

    Args:
        activations: the largest magnitude of each channel, ``[C]``.
        columns: that of the weights which read it, ``[C]``; ones where none does.

    >>> scales(torch.tensor([64.0, 1.0, 1.0, 1.0]), torch.ones(4), 0.5)
    tensor([4.0000, 0.5000, 0.5000, 0.5000])
    """
    log = alpha * _log2(activations) - (1 - alpha) * _log2(columns)
    return (log - log.mean()).round().exp2()


def _log2(x: Tensor) -> Tensor:
    smallest = x[x > 0].min() if (x > 0).any() else x.new_ones(())
    return x.clamp(min=smallest).log2()


def _largest(graph: fx.GraphModule, batches: Sequence[Batch], streams: Sequence[Stream]) -> dict[fx.Node, Tensor]:
    """The largest magnitude of each channel of every scaled edge in the floating-point model, ``[C]``."""
    found: dict[fx.Node, Tensor] = {}
    edges = {edge for stream in streams for edge in stream.edges}
    with evaluating(graph):
        for batch in batches:
            walk = Walk(graph, batch, nobody)
            for _ in walk.nodes:
                node, value = walk.step()
                if node in edges:
                    seen = value.abs().flatten(0, -2).amax(0)  # [..., C] -> [C]
                    found[node] = torch.maximum(found.get(node, seen), seen)
    return found
