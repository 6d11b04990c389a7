"""The mapping against exact fractions, its error, its bias, and what it does with values that are none."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantsim.numerics.fixed_point import (
    LEAST_EXPONENT,
    FixedPointError,
    from_accumulator,
    limit_of,
    shared_exponent,
    to_fixed_point,
)
from quantsim.numerics.fused import fused_kernels
from quantsim.numerics.random_bits import stream_of

BITS = list(range(4, 17))
TINY, DENORMAL = 2.0**-126, 2.0**-149
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def exact_nearest(values: list[float], bits: int) -> tuple[list[int], int]:
    """Exponent and mantissas by fractions; Python rounds half to even."""
    largest = max(map(abs, values), default=0.0)
    exponent = max(math.frexp(largest)[1] - bits + 1, LEAST_EXPONENT) if largest else LEAST_EXPONENT
    limit = limit_of(bits)
    return [max(-limit, min(limit, round(Fraction(v) / Fraction(2) ** exponent))) for v in values], exponent


@given(st.lists(float32s, max_size=20), st.sampled_from(BITS))
def test_nearest_is_exact(values: list[float], bits: int) -> None:
    found = to_fixed_point(torch.tensor(values), bits)
    mantissas, exponent = exact_nearest(values, bits)
    assert (found.mantissa.tolist(), found.exponent) == (mantissas, exponent)


@given(st.lists(float32s, min_size=1, max_size=20), st.sampled_from(BITS), st.integers(0, 2**63))
def test_stochastic_takes_a_neighbour_and_leaves_integers(values: list[float], bits: int, seed: int) -> None:
    x = torch.tensor(values)
    found = to_fixed_point(x, bits, stream_of(seed))
    exact = [Fraction(v) / Fraction(2) ** found.exponent for v in values]
    limit = limit_of(bits)
    for m, value in zip(found.mantissa.tolist(), exact, strict=True):
        assert m in {max(-limit, min(limit, n)) for n in (math.floor(value), math.ceil(value))}
    again = to_fixed_point(found.value(), bits, stream_of(seed + 1), exponent=found.exponent)
    assert torch.equal(again.mantissa, found.mantissa)


@pytest.mark.parametrize("bits", BITS)
def test_every_integer_survives(bits: int) -> None:
    limit = limit_of(bits)
    grid = torch.arange(-limit, limit + 1).float() * 2.0**-20
    for stream in (None, stream_of(bits)):
        found = to_fixed_point(grid, bits, stream)
        assert torch.equal(found.value(), grid)
        assert found.mantissa.dtype == (torch.int8 if bits <= 8 else torch.int16)


def normalized_error(x: Tensor, bits: int, stream: tuple[int, int] | None) -> float:
    return float((to_fixed_point(x, bits, stream).value().double() - x.double()).square().mean())


@pytest.mark.parametrize("bits", BITS[:-1])
def test_error_against_bits_is_as_predicted(bits: int) -> None:
    """A bit more is a quarter of the mean square error; step² / 12 to the nearest, step² / 6 stochastic, within 3 %."""
    x = torch.rand(1 << 18) * 1.74 - 0.87  # below the top step of 4 bits
    step = 2.0 ** (1 - bits)
    assert normalized_error(x, bits, None) == pytest.approx(step**2 / 12, rel=0.03)
    assert normalized_error(x, bits, stream_of(bits)) == pytest.approx(step**2 / 6, rel=0.03)
    assert normalized_error(x, bits, None) / normalized_error(x, bits + 1, None) == pytest.approx(4, rel=0.05)


def z_scores(x: Tensor, bits: int, draws: int, stochastic: bool = True) -> Tensor:
    """Of each element: how many standard errors the mean of ``draws`` mappings is away from it."""
    y = x.double() / 2.0 ** shared_exponent(x, bits)
    fraction = y - y.floor()
    total = torch.zeros_like(y)
    for i in range(draws):
        total += to_fixed_point(x, bits, stream_of(i, bits) if stochastic else None).mantissa.double()
    return (total / draws - y) / (fraction * (1 - fraction) / draws).sqrt()


def between_steps(bits: int) -> Tensor:
    """Values a twentieth of a step or more away from every integer, where 400 draws are near enough to normal."""
    return (torch.randint(-limit_of(bits), limit_of(bits), (2000,)) + 0.05 + 0.9 * torch.rand(2000)) * 2.0 ** (1 - bits)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    """2,000 elements, 400 draws each. Under the null a |z| above 5.5 has probability 4e-8 an element, so 8e-5 for any; the sum of z²
    is chi-squared with 2,000 degrees, 5 standard deviations to either side."""
    z = z_scores(between_steps(bits), bits, draws=400)
    assert z.abs().max() < 5.5
    assert abs(z.square().sum() - 2000) < 5 * math.sqrt(2 * 2000)
    assert abs(z.sum()) < 5 * math.sqrt(2000)


def test_the_test_of_bias_sees_one() -> None:
    assert z_scores(between_steps(8), 8, draws=400, stochastic=False).abs().max() > 5.5


def test_the_top_step_is_clamped() -> None:
    for stream in (None, stream_of(0)):
        assert to_fixed_point(torch.tensor([127.9, -127.9]), 8, stream).mantissa.tolist() == [127, -127]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = value
    with pytest.raises(FixedPointError, match=r"encoder\.query, gradient: 1 of 12 values are NaN or infinite \(shape \[3, 4\]\)"):
        to_fixed_point(x, 8, what="encoder.query, gradient")


@pytest.mark.parametrize("bits", [3, 17, 0, -8, 8.0, True, "8"], ids=repr)
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(FixedPointError, match="expected an integer from 4 to 16"):
        to_fixed_point(torch.ones(2), bits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_zeros_and_nothing(bits: int) -> None:
    for shape in ((0,), (0, 5), (3, 0), (4,), ()):
        for stream in (None, stream_of(1)):
            found = to_fixed_point(torch.zeros(shape), bits, stream)
            assert found.exponent == LEAST_EXPONENT
            assert found.mantissa.shape == shape
            assert not found.value().any()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_denormals_are_on_the_grid_of_the_smallest_normal_number(bits: int) -> None:
    x = torch.tensor([DENORMAL, -DENORMAL, TINY / 2, 0.75 * TINY, TINY, 3 * TINY])
    assert to_fixed_point(x, bits).value().tolist() == [0.0, 0.0, 0.0, TINY, TINY, 3 * TINY]
    assert set(to_fixed_point(x, bits, stream_of(1)).value().tolist()) <= {0.0, -TINY, TINY, 3 * TINY}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_largest_numbers_stay_finite(bits: int) -> None:
    x = torch.tensor([torch.finfo(torch.float32).max, -1.0])
    assert to_fixed_point(x, bits).value().isfinite().all()


def test_an_all_zero_channel_stays_zero() -> None:
    x = torch.randn(4, 50)
    x[2] = 0
    assert not to_fixed_point(x, 8, stream_of(3)).mantissa[2].any()


def test_half_precision_and_strides_are_taken() -> None:
    x = torch.randn(6, 4).to(torch.bfloat16)
    assert torch.equal(to_fixed_point(x.t(), 8).mantissa, to_fixed_point(x.float(), 8).mantissa.t())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("exponent", [-252, -150, -127, -126, -3, 0, 100, 252])
def test_the_inverse_rounds_once(exponent: int, dtype: torch.dtype) -> None:
    integers = torch.tensor([0, 1, -1, 2**24 + 1, -(2**24) - 3, 2**30 + 7], dtype=dtype)
    rounded = integers.double().float().double()
    assert torch.equal(from_accumulator(integers, exponent), (rounded * 2.0**exponent).float())


def test_the_same_on_any_number_of_threads() -> None:
    x, threads = torch.randn(300_000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(to_fixed_point(x, 8, stream_of(5)).mantissa)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("bits", [8, 16])
def test_fused_kernels_give_the_same_bits(bits: int) -> None:
    x, bias = torch.randn(37, 4099), torch.randn(4099)
    accumulator = torch.randint(-(2**30), 2**30, (37, 4099), dtype=torch.int32)
    eager = [to_fixed_point(x, bits, stream).mantissa for stream in (None, stream_of(bits))]
    eager += [from_accumulator(accumulator, -30), from_accumulator(accumulator, -30, bias)]
    with fused_kernels() as works:
        if not works:
            pytest.skip("no C++ compiler")
        fused = [to_fixed_point(x, bits, stream).mantissa for stream in (None, stream_of(bits))]
        fused += [from_accumulator(accumulator, -30), from_accumulator(accumulator, -30, bias)]
    assert all(torch.equal(a, b) for a, b in zip(eager, fused, strict=True))
