"""Products of 9 to 16 bits by digits, in one pass each: exact integers, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.kernels import amx
from quantsim.kernels.digits import cut, missing_for_digits, sums, together
from quantsim.kernels.integer_matmul import int8_kernel_is_exact, multiply
from quantsim.numerics.fixed_point import FixedPoint, factors_of, from_accumulator
from tests.kernels.operands import mantissas

pytestmark = pytest.mark.skipif(bool(missing_for_digits()), reason=missing_for_digits())
KERNEL = pytest.mark.skipif(not int8_kernel_is_exact(), reason="no exact int8 kernel: products are of float64 here")


@pytest.fixture(scope="module", autouse=True)
def _no_tiles() -> Iterator[None]:
    """Digits are for CPUs without AMX, which would take the products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "missing_for_tiles", lambda: "not in these tests")
        yield


@KERNEL
@settings(max_examples=150, deadline=None)
@given(
    bits=st.tuples(st.integers(4, 16), st.integers(9, 16)),
    sizes=st.tuples(st.integers(17, 40), st.integers(1, 70), st.integers(1, 40)),
    turned=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    exponent=st.integers(-140, 100),
    seed=st.integers(0, 999),
)
def test_a_product_is_the_exact_one_rounded_once(bits, sizes, turned, exponent, seed) -> None:
    n, k, m = sizes
    a_bits, b_bits = bits if turned[2] else bits[::-1]
    a = mantissas(a_bits, (k, n), seed).t() if turned[0] else mantissas(a_bits, (n, k), seed)
    b = mantissas(b_bits, (m, k), seed + 1).t() if turned[1] else mantissas(b_bits, (k, m), seed + 1)
    bias = torch.randn(m, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
    found = multiply(FixedPoint(a, exponent, a_bits), FixedPoint(b, 3, b_bits), bias)
    assert torch.equal(found, from_accumulator(a.double() @ b.double(), exponent + 3, bias))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.tuples(st.integers(4, 16), st.integers(4, 16)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 40)),
    seed=st.integers(0, 999),
)
def test_exponents_of_rows_and_columns(bits, sizes, seed) -> None:
    (n, k, m), generator = sizes, torch.Generator().manual_seed(seed)
    a, b = mantissas(bits[0], (n, k), seed), mantissas(bits[1], (k, m), seed + 1)
    rows = torch.randint(-126, 40, (n, 1), dtype=torch.int32, generator=generator)
    columns = torch.randint(-30, 40, (1, m), dtype=torch.int32, generator=generator)
    bias = torch.randn(m, generator=generator) if seed % 2 else None
    found = multiply(FixedPoint(a, rows, bits[0]), FixedPoint(b, columns, bits[1]), bias)
    assert torch.equal(found, from_accumulator(a.double() @ b.double(), rows + columns, bias))


def test_every_mantissa_of_16_bits_is_cut_and_put_together() -> None:
    m = torch.arange(-(2**15) + 1, 2**15, dtype=torch.int16).reshape(-1, 5)
    low, high = cut(m, sixteen=True)
    assert torch.equal(256 * high.int() + low.int() + 128, m.int())
    m = m[(m.abs() < 2**14).all(1)]
    low, high = cut(m.t(), sixteen=False)
    assert low.shape == (5, len(m))
    assert torch.equal(256 * high.int() + low.int(), m.t().int())


def test_sums_along_both_axes_of_both_layouts() -> None:
    m = torch.randint(-(2**15) + 1, 2**15, (37, 600), dtype=torch.int16)
    tall = torch.full((70_000, 3), -(2**15) + 1, dtype=torch.int16)  # longer than an int32 holds
    for x in (m, m.t(), m.to(torch.int8), m[:, ::3], tall):
        for dim in (0, 1):
            assert torch.equal(sums(x, dim, -3, 7), -3 * x.sum(dim, dtype=torch.int64) + 7)


def test_64_bits_are_rounded_to_float32_once() -> None:
    """2**40 + 2**16 + 1 is above the middle of two floats; in two roundings (of float64 sums of floats) it would be below."""
    products = [(torch.tensor([[2**28, -(2**28)]], dtype=torch.int32), 12), (torch.tensor([[2**8, -(2**8)]], dtype=torch.int32), 8)]
    found = together(products, torch.tensor([0]), torch.tensor([1, -1]), factors_of(-3))
    assert found.tolist() == [[(2.0**40 + 2**17) / 8, -(2.0**40 + 2**17) / 8]]
    assert together([(torch.zeros(0, 4, dtype=torch.int32), 0)], None, None, (1.0, 1.0)).shape == (0, 4)
