"""Products of 4 to 16 bits are exact: against Python's integers, at the extremes, on every path."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantsim.kernels import integer_matmul as module
from quantsim.kernels.integer_matmul import digits, int8_kernel_is_exact, integer_matmul, multiply
from quantsim.numerics.fixed_point import FixedPoint, FixedPointError, limit_of, mantissa_dtype

BITS = list(range(4, 17))


def integers(bits: int, *shape: int, seed: int = 0, extreme: bool = False) -> Tensor:
    generator, limit = torch.Generator().manual_seed(seed), limit_of(bits)
    if extreme:
        return (torch.randint(0, 2, shape, generator=generator) * 2 * limit - limit).to(mantissa_dtype(bits))
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(mantissa_dtype(bits))


def by_python(a: Tensor, b: Tensor) -> list[list[int]]:
    found: list[list[int]] = (a.numpy().astype(object) @ b.numpy().astype(object)).tolist()
    return found


def as_integers(x: Tensor) -> list[list[int]]:
    return [[int(v) for v in row] for row in x.tolist()]


@given(
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 5)),
    seed=st.integers(0, 2**32),
    extreme=st.booleans(),
)
def test_exact(bits: tuple[int, int], shape: tuple[int, int, int], seed: int, extreme: bool) -> None:
    n, k, m = shape
    a, b = integers(bits[0], n, k, seed=seed, extreme=extreme), integers(bits[1], k, m, seed=seed + 1)
    assert as_integers(integer_matmul(a, b, *bits)) == by_python(a, b)


@pytest.mark.parametrize("kernel", [True, False], ids=["int8 kernel", "no kernel"])
@pytest.mark.parametrize("bits", [(8, 8), (10, 10), (12, 12), (16, 16), (8, 16), (15, 9)], ids=str)
def test_the_largest_sums_of_a_bert(bits: tuple[int, int], kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,072 terms of one sign, then of random signs."""
    if not kernel:
        monkeypatch.setattr(module, "int8_kernel_is_exact", lambda: False)
    for a in (torch.full((2, 3072), limit_of(bits[0])).to(mantissa_dtype(bits[0])), integers(bits[0], 2, 3072, extreme=True)):
        b = torch.full((3072, 2), -limit_of(bits[1])).to(mantissa_dtype(bits[1]))
        b[:, 1] = -b[:, 1]
        assert as_integers(integer_matmul(a, b, *bits)) == by_python(a, b)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("k", [2**17 - 1, 2**17, 2**22])
def test_long_sums(bits: int, k: int) -> None:
    a = torch.full((1, k), limit_of(bits)).to(mantissa_dtype(bits))
    assert int(integer_matmul(a, a.t(), bits, bits)) == k * limit_of(bits) ** 2
    a[0, 0] -= 1
    assert int(integer_matmul(a, a.t(), bits, bits)) == k * limit_of(bits) ** 2 - 2 * limit_of(bits) + 1


def test_a_sum_that_is_too_long_is_refused() -> None:
    a = torch.zeros(1, 2**22 + 1, dtype=torch.int8)
    with pytest.raises(FixedPointError, match="cut the batch"):
        integer_matmul(a, a.t(), 8, 8)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 4), (4, 3, 0), (1, 1, 1)], ids=str)
def test_nothing_and_one(bits: int, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    a, b = integers(bits, n, k), integers(bits, k, m)
    found = integer_matmul(a, b, bits, bits)
    assert found.shape == (n, m)
    assert as_integers(found) == [[int(v) for v in row] for row in (a.long() @ b.long()).tolist()]


@pytest.mark.parametrize("bits", [8, 16])
def test_batches_and_any_strides(bits: int) -> None:
    a, b = integers(bits, 2, 3, 5, 90), integers(bits, 2, 3, 7, 90, extreme=True)
    assert torch.equal(integer_matmul(a, b.mT, bits, bits).long(), a.long() @ b.long().mT)
    x, y = integers(bits, 90, 5), integers(bits, 180, 7)[::2]
    assert torch.equal(integer_matmul(x.t(), y, bits, bits).long(), x.long().t() @ y.long())


def test_float32_stops_where_it_would_round() -> None:
    a = torch.full((2, 1, 1041), 127, dtype=torch.int8)
    assert integer_matmul(a[..., :1040], a.mT[:, :1040], 8, 8).dtype == torch.float32
    assert integer_matmul(a, a.mT, 8, 8).dtype == torch.float64


def test_a_lower_precision_of_float32_products_changes_nothing() -> None:
    """``medium`` multiplies float32 as bf16: 8 bits of a mantissa."""
    a, b = integers(10, 4, 64, 32), integers(10, 4, 32, 64, seed=1)
    expected = a.long() @ b.long()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(integer_matmul(a, b, 10, 10).long(), expected), precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bits", BITS)
def test_digits_are_int8_and_hold_every_integer(bits: int) -> None:
    grid = torch.arange(-limit_of(bits), limit_of(bits) + 1).to(mantissa_dtype(bits))
    found, offset = digits(grid, bits)
    assert all(digit.dtype == torch.int8 for digit in found)
    assert torch.equal(sum(256**i * digit.long() for i, digit in enumerate(found)) + offset, grid.long())


def test_exponents_are_added() -> None:
    a, b = FixedPoint(integers(8, 3, 9), -20, 8), FixedPoint(integers(12, 9, 2), 7, 12)
    bias = torch.tensor([0.5, -3.0])
    assert torch.equal(multiply(a, b), (a.value().double() @ b.value().double()).float())
    assert torch.equal(multiply(a, b, bias), multiply(a, b) + bias)


SATURATING = """
import torch
from quantsim.kernels.integer_matmul import integer_matmul
a = torch.full((64, 512), 127, dtype=torch.int8)
print(int(integer_matmul(a, a.t(), 8, 8)[0, 0]))
"""


@pytest.mark.skipif(not int8_kernel_is_exact(), reason="this CPU's int8 kernels saturate already")
def test_a_cpu_whose_kernels_saturate_gets_exact_products_too() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    found = subprocess.run([sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(127 * 127 * 512)]


def test_numpy_would_have_overflowed() -> None:
    """The reference is Python's integers for a reason: int32 is not enough from 12 bits on."""
    a = np.full((1, 3072), limit_of(12), dtype=np.int32)
    assert int((a @ a.T)[0, 0]) != 3072 * limit_of(12) ** 2
