"""Rescales against exact integers, at the ends of what they take."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.numerics.dyadic import INT32_MAX, LEAST_BITS, OverflowRisk, channel_rescale, dyadic, rescale, rescale_channels

RATIOS = st.floats(1e-12, 1e6, allow_nan=False)
BOUNDS = st.integers(1, INT32_MAX)


def exactly(q: int, multiplier: int, shift: int) -> int:
    """The equation in Python's integers, which don't overflow."""
    return (q * multiplier + (1 << shift >> 1)) >> shift


@settings(max_examples=300, deadline=None)
@given(ratio=RATIOS, bound=BOUNDS, data=st.data())
def test_the_equation_without_overflow(ratio, bound, data):
    if bound * ratio >= 2**30:
        return
    d = dyadic(ratio, bound)
    q = [-bound, bound, 0, data.draw(st.integers(-bound, bound))]
    found = rescale(torch.tensor(q, dtype=torch.int32), *d.numbers).tolist()
    assert found == [exactly(x, d.multiplier, d.shift) for x in q]
    limit = 2**63 if d.wide else 2**31
    assert bound * d.multiplier + (1 << d.shift >> 1) < limit
    bits = 31 if d.wide else 30 - bound.bit_length()
    for x, y in zip(q, found, strict=True):
        assert abs(y - x * Fraction(ratio)) <= Fraction(1, 2) + max(abs(x) * Fraction(ratio) / 2**bits, Fraction(1, 2**13))


def test_64_bits_where_32_leave_too_few_and_nowhere_else():
    for bits in range(1, 32):
        assert dyadic(0.3, 2**bits - 1).wide == (30 - bits < LEAST_BITS)


def test_clamped_to_8_bits():
    d = dyadic(0.5, 1000, -128, 127)
    found = rescale(torch.tensor([-1000, -3, -1, 1, 3, 1000], dtype=torch.int32), *d.numbers, zero_point=0, dtype=torch.int8)
    assert found.tolist() == [-128, -1, 0, 1, 2, 127]  # halves go up
    assert found.dtype == torch.int8
    shifted = rescale(torch.tensor([0, 250], dtype=torch.int32), *dyadic(1.0, 250, -10, 245).numbers, zero_point=10, dtype=torch.uint8)
    assert shifted.tolist() == [10, 255]


@pytest.mark.parametrize(
    "ratio, bound, message",
    [
        (float("nan"), 1, "expected a finite number"),
        (-1.0, 1, "not negative"),
        (1.0, 2**31, "what 32 bits hold"),
        (1e12, 2**30, "more than 64 bits"),
    ],
)
def test_what_cannot_be_held_is_refused(ratio, bound, message):
    with pytest.raises(OverflowRisk, match=message):
        dyadic(ratio, bound)


@settings(max_examples=200, deadline=None)
@given(
    channels=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e6, 1e6), st.integers(0, 2**31 - 1)), min_size=1, max_size=5),
    sign=st.sampled_from([-1, 1]),
)
def test_channels_without_overflow(channels, sign):
    ratio, offset, bound = (torch.tensor(column, dtype=torch.float64) for column in zip(*channels, strict=True))
    c = channel_rescale(ratio, offset, bound)
    q = (sign * bound).to(torch.int32)
    found = rescale_channels(q, c.multiplier, c.offset, c.shift, -(2**62), 2**62, torch.int64)
    expected = [(x * m + b) >> c.shift for x, m, b in zip(q.tolist(), c.multiplier.tolist(), c.offset.tolist(), strict=True)]
    assert found.tolist() == expected
    for x, (r, o, _), y in zip(q.tolist(), channels, found.tolist(), strict=True):
        error = Fraction(1, 2) + (Fraction(abs(x), 2) + 1) / 2**c.shift
        assert abs(y - (x * Fraction(r) + Fraction(o))) <= error


def test_a_dead_channel_keeps_its_bias():
    """Weights of 0 have the smallest scale there is; a bias in 32 bits at that scale would overflow."""
    c = channel_rescale(torch.tensor([1e-40, 0.0, 1.0]).double(), torch.tensor([5.0, -7.0, 0.0]).double(), torch.full((3,), 1e5).double())
    found = rescale_channels(torch.tensor([[99999, 99999, 3]], dtype=torch.int32), c.multiplier, c.offset, c.shift, -128, 127)
    assert found.tolist() == [[5, -7, 3]]


def test_a_scale_that_is_far_too_fine_is_refused():
    with pytest.raises(OverflowRisk, match=r"expected less than 2\*\*60"):
        channel_rescale(torch.tensor([1e12]).double(), torch.tensor([0.0]).double(), torch.tensor([1e9]).double())
