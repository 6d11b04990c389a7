"""The mapping on kernels: the mantissas, exponents and errors of ``numerics.fixed_point``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.kernels import mapping
from quantsim.kernels.mapping import missing_for_mapping, shared_exponent, sum_scaled_rows, to_fixed_point, to_fixed_point_by
from quantsim.numerics import fixed_point
from quantsim.numerics.fixed_point import FixedPointError, power_of_two
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
    for axis, shape in ((0, (0, 1)), (1, (1, 4))):
        nothing = to_fixed_point_by(axis, torch.zeros(0, 4), 8)
        assert (nothing.mantissa.shape, nothing.exponent.shape) == ((0, 4), shape)
    assert torch.equal(to_fixed_point_by(0, x.t(), 8).mantissa, fixed_point.to_fixed_point_by(0, x.t(), 8).mantissa)


@settings(max_examples=200, deadline=None)
@given(
    axis=st.sampled_from((0, 1)),
    shape=st.tuples(st.sampled_from((1, 2, 17, 64)), st.sampled_from((1, 3, 16, 513, 1100))),
    bits=st.integers(4, 16),
    magnitude=st.integers(-40, 30),
    times=st.booleans(),
    stream=st.none() | st.tuples(st.integers(0, 2**63), st.integers(0, 99)),
    seed=st.integers(0, 99),
)
def test_exponents_of_rows_and_columns_are_those_of_the_formula(axis, shape, bits, magnitude, times, stream, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).double().mul(10.0**magnitude).float()
    x *= torch.exp2(torch.randint(-9, 10, (shape[0], 1), generator=generator).float())
    x[seed % shape[0]] = 0
    other = (1, shape[1]) if axis == 0 else (shape[0], 1)
    moved = torch.randint(-20, 21, other, dtype=torch.int32, generator=generator) if times else None
    keys = None if stream is None else stream_of(*stream)
    found, expected = (m.to_fixed_point_by(axis, x, bits, keys, times=moved) for m in (mapping, fixed_point))
    assert torch.equal(found.exponent, expected.exponent)
    assert torch.equal(found.mantissa, expected.mantissa)
    if axis == 0:
        in_float64 = (found.mantissa.double() * power_of_two(found.exponent, torch.float64)).sum(0)
        torch.testing.assert_close(sum_scaled_rows(found), in_float64, rtol=1e-12, atol=float(found.step.max()) * 1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    message = r"classifier, gradient: 1 of 12 values are NaN or infinite \(shape \[3, 4\]\)"
    with pytest.raises(FixedPointError, match=message):
        to_fixed_point(x, 8, what="classifier, gradient")
    for axis in (0, 1):
        with pytest.raises(FixedPointError, match=message):
            to_fixed_point_by(axis, x, 8, what="classifier, gradient")


def test_exponents_that_are_no_neighbours_in_memory_are_read_as_they_are() -> None:
    q = to_fixed_point_by(0, torch.randn(50, 8), 8)
    strided = torch.stack([q.exponent, q.exponent + 9], dim=1).flatten(1)[:, :1]
    assert torch.equal(sum_scaled_rows(replace(q, exponent=strided)), sum_scaled_rows(q))


@pytest.mark.parametrize("by_axis", [to_fixed_point_by, fixed_point.to_fixed_point_by], ids=["kernel", "formula"])
def test_operands_that_do_not_fit_are_refused(by_axis) -> None:
    """The kernel would read past them."""
    x = torch.ones(3, 4)
    for axis, times in ((0, torch.ones(3, 1, dtype=torch.int32)), (1, torch.ones(1, 4, dtype=torch.int32)), (0, torch.ones(1, 4).long())):
        with pytest.raises(ValueError, match=r"layer, weight: times \[.*\] of torch.int.* for axis . of \[3, 4\]; expected int32 \["):
            by_axis(axis, x, 8, times=times, what="layer, weight")
    with pytest.raises(ValueError, match=r"\[2, 3, 4\], axis 0; expected a matrix, and axis 0 or 1"):
        by_axis(0, torch.ones(2, 3, 4), 8)
    with pytest.raises(ValueError, match="axis -1"):
        by_axis(-1, x, 8)


@pytest.mark.parametrize("to_integers", [to_fixed_point_by, fixed_point.to_fixed_point_by], ids=["kernel", "formula"])
def test_a_product_with_times_that_is_no_float32_is_called_so(to_integers) -> None:
    x, times = torch.full((2, 3), 1e30), torch.full((1, 3), 66, dtype=torch.int32)
    with pytest.raises(FixedPointError, match=r"dense, gradient: 6 of 6 values .* multiplied by the powers of two of the other operand"):
        to_integers(0, x, 8, times=times, what="dense, gradient")


def test_sums_of_rows_want_an_exponent_of_each_row() -> None:
    q = to_fixed_point_by(1, torch.ones(50, 4), 8)
    with pytest.raises(ValueError, match=r"exponents: \[1, 4\]; expected one of each row, \[50, 1\]"):
        sum_scaled_rows(q)
    with pytest.raises(ValueError, match="exponents: one of all"):
        sum_scaled_rows(to_fixed_point(torch.ones(5, 4), 8))


@pytest.mark.parametrize("to_integers", [to_fixed_point, fixed_point.to_fixed_point], ids=["kernel", "formula"])
def test_what_is_not_finite_is_refused_with_a_given_exponent_too(to_integers) -> None:
    with pytest.raises(FixedPointError, match="2 of 3 values are NaN or infinite"):
        to_integers(torch.tensor([torch.nan, torch.inf, 1.0]), 8, exponent=-6)


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(FixedPointError, match="weight: 17; expected an integer from 4 to 16"):
        to_fixed_point(torch.ones(3), 17, what="weight")


def test_the_number_of_threads_changes_nothing() -> None:
    x, threads = torch.randn(100_003), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            by_axis = [to_fixed_point_by(axis, x[:99_900].reshape(300, 333), 12, (3, 4)) for axis in (0, 1)]
            tensors = [to_fixed_point(x, 12, (3, 4)).mantissa, *(q.mantissa for q in by_axis), sum_scaled_rows(by_axis[0])]
            found.append(torch.cat([t.double().flatten() for t in tensors]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
