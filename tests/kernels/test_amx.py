"""Products on AMX tiles: exact integers, rounded once, for every shape, width and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantsim.kernels import amx
from quantsim.kernels.amx import LARGEST_K, missing_for_tiles, product
from quantsim.kernels.build import BuildError
from quantsim.kernels.integer_matmul import multiply
from quantsim.numerics.fixed_point import FixedPoint, from_accumulator
from tests.kernels.operands import mantissas

TILES = pytest.mark.skipif(bool(missing_for_tiles()), reason=missing_for_tiles())
SIZES = st.sampled_from((1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100))


@TILES
@settings(max_examples=200, deadline=None)
@given(
    bits=st.tuples(st.integers(4, 16), st.integers(4, 16)),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    turned=st.tuples(st.booleans(), st.booleans()),
    exponent=st.integers(-140, 100),
    seed=st.integers(0, 999),
)
def test_a_product_is_the_exact_one_rounded_once(bits, sizes, turned, exponent, seed) -> None:
    n, k, m = sizes
    a = mantissas(bits[0], (k, n), seed).t() if turned[0] else mantissas(bits[0], (n, k), seed)
    b = mantissas(bits[1], (m, k), seed + 1).t() if turned[1] else mantissas(bits[1], (k, m), seed + 1)
    bias = torch.randn(m, generator=torch.Generator().manual_seed(seed)) if seed % 2 else None
    found = product(a, b, exponent - 3, 3, bias)
    assert torch.equal(found, from_accumulator(a.double() @ b.double(), exponent, bias))


@TILES
@settings(max_examples=60, deadline=None)
@given(bits=st.tuples(st.integers(4, 16), st.integers(4, 16)), sizes=st.tuples(SIZES, SIZES, SIZES), seed=st.integers(0, 999))
def test_exponents_of_rows_and_columns(bits, sizes, seed) -> None:
    """From the least normal number to the largest; also where the result is not normal."""
    (n, k, m), generator = sizes, torch.Generator().manual_seed(seed)
    a, b = mantissas(bits[0], (n, k), seed), mantissas(bits[1], (k, m), seed + 1)
    rows = torch.randint(-126, 40, (n, 1), dtype=torch.int32, generator=generator)
    columns = torch.randint(-30, 40, (1, m), dtype=torch.int32, generator=generator)
    bias = torch.randn(m, generator=generator) if seed % 2 else None
    far = torch.full((n, 1), 120, dtype=torch.int32)  # times 2**-100: only their sum counts
    assert torch.equal(product(a, b, far, -100), from_accumulator(a.double() @ b.double(), 20))
    of_rows, of_both = (multiply(FixedPoint(a, rows, bits[0]), FixedPoint(b, e, bits[1]), bias) for e in (-3, columns))
    exact = a.double() @ b.double()
    assert torch.equal(of_rows, from_accumulator(exact, rows - 3, bias))
    assert torch.equal(of_both, from_accumulator(exact, rows + columns, bias))


@TILES
def test_every_mantissa_of_16_bits_times_the_least_and_the_largest() -> None:
    m = torch.arange(-(2**15) + 1, 2**15, dtype=torch.int16)[:, None]
    ends = torch.tensor([[1, -1, 32767, -32767, 255, 256]], dtype=torch.int16)
    assert torch.equal(product(m, ends, 0, 0), (m.long() * ends).float())


@TILES
def test_the_longest_sums_of_the_largest_digits() -> None:
    """255 * 255 * LARGEST_K fits an int32; 64 bits are rounded to float32 once."""
    for value in (255, 32767, -32767, -32513):
        a = torch.full((17, LARGEST_K), value, dtype=torch.int16)
        assert torch.equal(product(a, a.t()[:, :3], 0, 0), torch.full((17, 3), float(value * value * LARGEST_K)))


@TILES
def test_empty_axes_and_strides() -> None:
    none = torch.zeros(3, 0, dtype=torch.int16)
    assert torch.equal(product(none, none.t(), 0, 0, torch.tensor([1.0, 2, 3])), torch.tensor([[1.0, 2, 3]] * 3))
    assert product(none.t(), torch.ones(3, 5, dtype=torch.int8), 0, 0).shape == (0, 5)
    left, right = mantissas(16, (40, 90), 1)[::2, ::3], mantissas(8, (40, 90), 2)[5:35, ::2]
    assert torch.equal(product(left, right, 0, 0), (left.double() @ right.double()).float())


@TILES
def test_the_number_of_threads_changes_nothing() -> None:
    a, b, threads = mantissas(16, (300, 500), 1), mantissas(12, (500, 700), 2), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(product(a, b, -1, -1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], x) for x in found[1:])


@TILES
def test_operands_that_are_expanded_and_another_default_dtype() -> None:
    a, b = mantissas(8, (1, 20), 1).expand(5, 20), mantissas(16, (20, 1), 2).expand(20, 7)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = product(a, b, 0, 0)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, (a.double() @ b.double()).float())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": torch.ones(9, 4, dtype=torch.int8)}, r"product of \[3, 5\] .* and \[9, 4\]"),
        ({"a": torch.ones(3, 5)}, r"torch.float32.*expected int8 or int16"),
        ({"bias": torch.ones(1)}, r"bias: \[1\] of torch.float32; expected \[4\]"),
        ({"a_exponent": torch.ones(5, 1, dtype=torch.int32)}, r"row_exponents: \[5, 1\] of torch.int32; expected \[3, 1\]"),
        ({"b_exponent": torch.ones(1, 4)}, r"column_exponents: \[1, 4\] of torch.float32; expected \[1, 4\] of torch.int32"),
    ],
    ids=["rows of b", "dtype", "bias", "row exponents", "column exponents"],
)
def test_what_the_kernel_would_read_past_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {"a": torch.ones(3, 5, dtype=torch.int8), "b": torch.ones(5, 4, dtype=torch.int8), "a_exponent": 0, "b_exponent": 0}
    with pytest.raises(ValueError, match=message):
        product(**(given | change))


def test_longer_sums_and_machines_without_tiles_take_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(amx, "product", product)
    long = torch.ones(2, LARGEST_K + 1, dtype=torch.int16)
    assert multiply(FixedPoint(long, 0, 16), FixedPoint(long.t(), 0, 16)).tolist() == [[LARGEST_K + 1.0] * 2] * 2
    monkeypatch.setattr(amx, "missing_for_tiles", lambda: "a reason")
    short = long[:, :5]
    assert multiply(FixedPoint(short, 0, 16), FixedPoint(short.t(), 0, 16)).tolist() == [[5.0] * 2] * 2


def test_a_compiler_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BuildError("no C++ compiler: g++ was not found")

    monkeypatch.setattr(amx, "_kernels", refuse)
    assert missing_for_tiles.__wrapped__() == "no C++ compiler: g++ was not found"
