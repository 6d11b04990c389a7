"""The mapping on kernels: the mantissas, exponents and errors of ``numerics.fixed_point``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.kernels import mapping
from quantsim.kernels.mapping import missing_for_mapping, shared_exponent, to_fixed_point
from quantsim.numerics import fixed_point
from quantsim.numerics.fixed_point import FixedPointError
from quantsim.numerics.random_bits import stream_of

pytestmark = pytest.mark.skipif(bool(missing_for_mapping()), reason=missing_for_mapping())


@settings(max_examples=200, deadline=None)
@given(
    size=st.sampled_from((1, 3, 16, 17, 1000, 40_000)),
    bits=st.integers(4, 16),
    magnitude=st.integers(-44, 37),
    stream=st.none() | st.tuples(st.integers(0, 2**63), st.integers(0, 99)),
    seed=st.integers(0, 99),
)
def test_mantissas_are_those_of_the_formula(size, bits, magnitude, stream, seed) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double().mul(10.0**magnitude).float()
    keys = None if stream is None else stream_of(*stream)
    found, expected = to_fixed_point(x, bits, keys), fixed_point.to_fixed_point(x, bits, keys)
    assert found.exponent == expected.exponent == shared_exponent(x, bits)
    assert found.mantissa.dtype == expected.mantissa.dtype
    assert torch.equal(found.mantissa, expected.mantissa)


@pytest.mark.parametrize("stream", [None, (12345, -678)])
def test_halves_ends_and_every_grid_point(stream: tuple[int, int] | None) -> None:
    """Every half step of 16 bits (ties to even), with an exponent that is given; what is beyond the ends is clamped."""
    x = torch.arange(-(2**16) - 9, 2**16 + 10).float() / 2
    found, expected = (m.to_fixed_point(x, 16, stream, exponent=0) for m in (mapping, fixed_point))
    assert torch.equal(found.mantissa, expected.mantissa)
    assert [int(end) for end in found.mantissa.aminmax()] == [-32767, 32767]


def test_strides_zeros_and_empty_tensors() -> None:
    x = torch.randn(30, 40)
    assert torch.equal(to_fixed_point(x.t(), 8).mantissa, fixed_point.to_fixed_point(x.t(), 8).mantissa)
    assert to_fixed_point(torch.zeros(3), 8).exponent == fixed_point.LEAST_EXPONENT
    assert to_fixed_point(torch.zeros(0, 4), 8).mantissa.shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(FixedPointError, match=r"classifier, gradient: 1 of 12 values are NaN or infinite \(shape \[3, 4\]\)"):
        to_fixed_point(x, 8, what="classifier, gradient")


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(FixedPointError, match="weight: 17; expected an integer from 4 to 16"):
        to_fixed_point(torch.ones(3), 17, what="weight")


def test_the_number_of_threads_changes_nothing() -> None:
    x, threads = torch.randn(100_003), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(to_fixed_point(x, 12, (3, 4)).mantissa)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
