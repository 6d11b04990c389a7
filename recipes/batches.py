"""Which rows share an optimizer step, and how processes and accumulated forward passes share them out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

CHUNK = 32  # batches whose rows are sorted by length together


class Batches:
    """Row numbers of each batch, drawn anew for each epoch from the seed and the epoch alone.

    Rows are shuffled, sorted by length in chunks of 32 batches, cut, and the batches shuffled: little padding, no
    order by length. Equal lengths make it a plain shuffle.

    >>> batches = Batches([3, 9, 3, 9], batch_size=2, seed=0)
    >>> sorted(sorted(batch) for batch in batches.of_epoch(0))
    [[0, 2], [1, 3]]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def of_epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        chunk = CHUNK * self.batch_size
        order = [i for start in range(0, len(order), chunk) for i in sorted(order[start : start + chunk], key=lambda i: self.lengths[i])]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def shares(batch: Sequence[int], rank: int, processes: int, accumulate: int) -> Iterator[tuple[list[int], float]]:
    """The forward passes of one process in one step: the rows of each, and their weight in the mean over the batch.

    The gradient of a mean over ``N`` rows is ``sum n / N * g`` over parts of ``n`` rows whose means have the gradients ``g``. So
    each loss is weighted by ``n / N`` and the gradients are summed, over passes and processes: those of the whole batch, also
    where it does not divide evenly. A process that gets no row takes the batch's first with weight 0, so that it works along.

    >>> [list(shares([5, 6, 7, 8], rank, 2, accumulate=2)) for rank in range(2)]
    [[([5], 0.25), ([7], 0.25)], [([6], 0.25), ([8], 0.25)]]
    >>> list(shares([5], 1, 2, accumulate=2))
    [([5], 0.0)]
    """
    mine = batch[rank::processes]
    if not mine:
        yield list(batch[:1]), 0.0
    for k in range(min(accumulate, len(mine))):
        part = list(mine[k::accumulate])
        yield part, len(part) / len(batch)
