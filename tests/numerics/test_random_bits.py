"""Numbers by counter: uniform, unrelated between streams, and the same however they are cut into parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from quantsim.numerics.random_bits import RANDOM_BITS, random_bits, stream_of

COUNT = 1 << 18


def drawn(*numbers: int, start: int = 0, count: int = COUNT) -> torch.Tensor:
    return random_bits(torch.tensor(stream_of(*numbers), dtype=torch.int32), start, count)


@pytest.mark.parametrize("shift", [0, 8, 16], ids=lambda shift: f"bits from {shift}")
@pytest.mark.parametrize("stream", [(0,), (1,), (2**63 - 1, 5, 1)], ids=str)
def test_every_byte_is_uniform(stream: tuple[int, ...], shift: int) -> None:
    """Chi-squared over 256 bins, two-sided at 1e-6."""
    counts = torch.bincount(drawn(*stream) >> shift & 255, minlength=256).double()
    statistic = float(((counts - COUNT / 256) ** 2).sum() / (COUNT / 256))
    assert chi2.ppf(5e-7, 255) < statistic < chi2.ppf(1 - 5e-7, 255)


def test_neighbours_and_streams_are_uncorrelated() -> None:
    """Correlations of 2**18 pairs stay below 5 standard errors; those of a stream with itself, shifted, as well."""
    streams = [drawn(*numbers).double().numpy() for numbers in ((0, 0), (0, 1), (1, 0), (0, 0, 0))]
    pairs = [(a, b) for i, a in enumerate(streams) for b in streams[:i]]
    pairs += [(streams[0][:-lag], streams[0][lag:]) for lag in (1, 2, 3, 768, 4096)]
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs) < 5 / COUNT**0.5


def test_all_bits_are_used() -> None:
    found = drawn(3)
    assert found.min() >= 0
    assert 2**RANDOM_BITS - 2**10 < found.max() < 2**RANDOM_BITS


def test_a_part_is_the_same_as_in_the_whole() -> None:
    torch.testing.assert_close(drawn(7, start=1000, count=50), drawn(7)[1000:1050], rtol=0, atol=0)


def test_streams_differ_in_order_and_value() -> None:
    keys = {stream_of(a, b, c) for a in range(20) for b in range(20) for c in range(4)}
    assert len(keys) == 1600
