"""Every row once an epoch, whoever computes it."""

from __future__ import annotations

import math

import pytest

from recipes.batches import Batches, shares


def test_batches_hold_every_row_once_and_differ_by_epoch() -> None:
    batches = Batches([5, 1, 4, 2, 3, 9, 8], batch_size=3, seed=0)
    first, second = batches.of_epoch(0), batches.of_epoch(1)
    assert first != second
    assert sorted(i for batch in second for i in batch) == list(range(7))
    assert len(second) == len(batches) == 3
    assert batches.of_epoch(0) == first
    assert Batches([5, 1, 4, 2, 3, 9, 8], batch_size=3, seed=1).of_epoch(0) != first


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = [i % 10 for i in range(200)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in Batches(lengths, 10, seed=0).of_epoch(0)]
    assert max(spread) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_shares_hold_every_row_of_a_batch_once(count: int, processes: int, accumulate: int) -> None:
    batch = list(range(100, 100 + count))
    parts = [list(shares(batch, rank, processes, accumulate)) for rank in range(processes)]
    assert sorted(i for mine in parts for rows, weight in mine if weight for i in rows) == batch
    assert math.isclose(sum(weight for mine in parts for _, weight in mine), 1.0)
    assert all(weight in (0.0, len(rows) / count) for mine in parts for rows, weight in mine)
    assert all(1 <= len(mine) <= accumulate for mine in parts)
