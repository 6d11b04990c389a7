"""Products of 8-bit integers against exact ones, at their largest sums, with any batch axes and zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.kernels import cpu
from quantsim.kernels.int8_matmul import LARGEST_AFFINE_SUM, LARGEST_SUM, affine_matmul, exact_matmul, int8_matmul, int_mm, scaled_matmul

KERNEL = not cpu.missing_for_int8()
ENDS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def random(shape, dtype, seed=0):
    low, high = ENDS[dtype]
    return torch.randint(low, high + 1, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [KERNEL, False], ids=["kernel", "float32"])
@pytest.mark.parametrize("dtype", ENDS)
@pytest.mark.parametrize(
    "left, right", [((5, 7), (7, 3)), ((2, 3, 5, 7), (2, 3, 7, 4)), ((4, 1, 7), (7, 3)), ((3, 1, 2, 9), (5, 9, 2)), ((1, 1), (1, 1))]
)
def test_exact(kernel, dtype, left, right):
    a, b = random(left, dtype), random(right, torch.int8, 1)
    found = int8_matmul(a, b, kernel)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long())


@pytest.mark.parametrize("kernel", [KERNEL, False], ids=["kernel", "float32"])
@pytest.mark.parametrize("a, b", [(255, -128), (255, 127), (-128, -128)])
def test_the_largest_sums(kernel, a, b):
    dtype = torch.uint8 if a > 127 else torch.int8
    found = int8_matmul(torch.full((2, LARGEST_SUM), a, dtype=dtype), torch.full((LARGEST_SUM, 2), b, dtype=torch.int8), kernel)
    assert found.unique().tolist() == [a * b * LARGEST_SUM]


def test_a_sum_that_may_overflow_is_refused():
    with pytest.raises(ValueError, match="65794 integers of 8 bits may overflow 32 bits; at most 65793"):
        int8_matmul(torch.zeros(1, LARGEST_SUM + 1, dtype=torch.int8), torch.zeros(LARGEST_SUM + 1, 1, dtype=torch.int8), False)


def test_transposed_and_sliced_operands():
    a, b = random((2, 4, 3, 8), torch.int8).transpose(1, 2), random((2, 6, 8), torch.int8, 1).transpose(1, 2)[:, None]
    assert torch.equal(int8_matmul(a, b, KERNEL).long(), a.long() @ b.long())


@settings(max_examples=100, deadline=None)
@given(
    left=st.sampled_from(list(ENDS)),
    right=st.sampled_from(list(ENDS)),
    za=st.integers(0, 255),
    zb=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_zero_points(left, right, za, zb, seed):
    za, zb = za + ENDS[left][0], zb + ENDS[right][0]
    a, b = random((2, 3, 40), left, seed), random((2, 40, 5), right, seed + 1)
    assert torch.equal(affine_matmul(a, b, za, zb, KERNEL).long(), (a.long() - za) @ (b.long() - zb))


@pytest.mark.parametrize("a, b, za, zb", [(255, 255, 0, 0), (0, 255, 255, 0), (0, 0, 255, 255)])
def test_the_largest_sums_of_differences(a, b, za, zb):
    n = LARGEST_AFFINE_SUM
    x, y = torch.full((1, n), a, dtype=torch.uint8), torch.full((n, 1), b, dtype=torch.uint8)
    assert affine_matmul(x, y, za, zb, KERNEL).item() == (a - za) * (b - zb) * n


def test_one_term_a_sum_with_the_strides_of_a_transposed_column() -> None:
    """torch._int_mm returns memory that nobody wrote to there (torch 2.13)."""
    if not KERNEL:
        pytest.skip(cpu.missing_for_int8())
    a, b = torch.full((17, 1), 5, dtype=torch.int8), torch.full((2, 1), 3, dtype=torch.int8).t()
    assert b.stride() == (1, 1)
    assert (int_mm(a, b) == 15).all()
    assert (int8_matmul(a, b, kernel=True) == 15).all()


@pytest.mark.parametrize("kernel", [KERNEL, False], ids=["kernel", "float32"])
def test_types_and_empty_sums_of_batches(kernel):
    """A uint8 on the right would be read as int8."""
    with pytest.raises(ValueError, match=r"a product of torch.uint8 and torch.uint8; expected int8 or uint8, and int8"):
        int8_matmul(torch.ones(1, 1, 4, dtype=torch.uint8), torch.full((1, 4, 1), 200, dtype=torch.uint8), kernel)
    found = int8_matmul(torch.zeros(2, 3, 0, dtype=torch.int8), torch.zeros(2, 0, 5, dtype=torch.int8), kernel)
    assert torch.equal(found, torch.zeros(2, 3, 5, dtype=torch.int32))


def test_long_sums_in_floating_point_are_rounded_once():
    """Of 3000 terms, which no float32 holds on the way: differences of two uint8 numbers, each with a zero point."""
    a, b = random((4, 3000), torch.uint8), random((3000, 5), torch.uint8, 1)
    assert torch.equal(exact_matmul(a.float(), b.float()), (a.double() @ b.double()).float())
    assert torch.equal(scaled_matmul(a, b, 3, 7, 1.0), ((a.double() - 3) @ (b.double() - 7)).float())
