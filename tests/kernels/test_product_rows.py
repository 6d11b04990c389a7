"""Products whose sums stay in the cache against a product and a program over its rows apart: bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantsim.kernels import product_rows
from quantsim.kernels.int8_matmul import int8_matmul
from quantsim.kernels.integer_rows import IntegerRows, Op, Step
from quantsim.kernels.product_rows import ProductRows, missing_for_product_rows
from quantsim.numerics.dyadic import channel_rescale

pytestmark = pytest.mark.skipif(bool(missing_for_product_rows()), reason=missing_for_product_rows())
PUSH, BESIDE, ADD = Step(Op.PUSH, (0,)), Step(Op.PUSH, (1,)), Step(Op.ADD)
SIZES = st.sampled_from((1, 2, 15, 31, 32, 33, 64, 65, 100))


@pytest.fixture(scope="module", autouse=True)
def _however_few_the_rows_are() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product_rows, "ROWS_OF_TILES", 0)
        yield


@pytest.fixture
def no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed is computed on tiles."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("a product apart")

    monkeypatch.setattr(product_rows, "int8_matmul", refused)


def integers(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Random; every third seed one end of the type, which makes the largest sums."""
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    if seed % 3 == 0:
        return torch.full(shape, high if seed % 2 else low, dtype=dtype)
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(SIZES, st.sampled_from((0, 1, 3, 64, 65, 130)), SIZES),
    left=st.sampled_from([torch.int8, torch.uint8]),
    turned=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_a_product_and_its_rescale(sizes: tuple[int, int, int], left: torch.dtype, turned: tuple[bool, bool], seed: int) -> None:
    n, k, m = sizes
    a = integers(left, k, n, seed=seed).t() if turned[0] else integers(left, n, k, seed=seed)
    b = integers(torch.int8, m, k, seed=seed + 1).t() if turned[1] else integers(torch.int8, k, m, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    bound = torch.full((m,), 255.0 * 128 * max(k, 1), dtype=torch.float64)
    numbers = channel_rescale(*(torch.rand(m, dtype=torch.float64, generator=generator) * x for x in (200 / bound, 99)), bound)
    steps, constants = [PUSH, Step(Op.CHANNELS, (numbers.shift, -128, 127), (0, 1))], (numbers.multiplier, numbers.offset)
    sums = int8_matmul(a, b, kernel=False)
    assert torch.equal(ProductRows(steps, constants, torch.int8, 0, True)(a, b), IntegerRows(steps, constants, torch.int8)(sums))
    assert torch.equal(ProductRows([PUSH], (), torch.int32, 0, True)(a, b), sums)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.sampled_from([(1,), (3,), (2, 3), (1, 4)]),
    sizes=st.tuples(SIZES, st.sampled_from((1, 16, 64, 65)), SIZES),
    left=st.sampled_from([torch.int8, torch.uint8]),
    turned=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_a_batch_of_products_with_another_operand(batch, sizes, left, turned, seed) -> None:
    """The order of operands, and one that is broadcast over the products."""
    n, k, m = sizes
    a = integers(left, *batch, k, n, seed=seed).mT if turned[0] else integers(left, *batch, n, k, seed=seed)
    b = integers(torch.int8, *batch[1:], m, k, seed=seed + 1).mT if turned[1] else integers(torch.int8, *batch[1:], k, m, seed=seed + 1)
    b = b if b.ndim > 2 else b[None]
    other = integers(torch.int8, n, m, seed=seed + 2)
    expected = int8_matmul(a, b, kernel=False) + other
    for place in (0, 1):
        module = ProductRows([PUSH, BESIDE, ADD], (), torch.int32, place, True)
        assert torch.equal(module(a, b, other), expected)


@pytest.mark.usefixtures("no_other_kernel")
def test_rows_of_a_linear_heads_of_attention_and_long_bands() -> None:
    hidden, weight = integers(torch.int8, 4, 50, 96, seed=1), integers(torch.int8, 200, 96, seed=2)
    sums = ProductRows([PUSH], (), torch.int32, 0, True)
    assert torch.equal(sums(hidden, weight.t()), (hidden.double() @ weight.t().double()).int())
    q, k = (integers(torch.int8, 2, 40, 3, 16, seed=seed).transpose(1, 2) for seed in (4, 5))
    assert torch.equal(sums(q, k.transpose(2, 3)), (q.double() @ k.transpose(2, 3).double()).int())
    assert torch.equal(sums(q[:, :, ::2], k.transpose(2, 3)[..., 1:]), (q[:, :, ::2].double() @ k.transpose(2, 3)[..., 1:].double()).int())
    wide, long = integers(torch.uint8, 300, 1100, seed=7), integers(torch.int8, 1100, 3000, seed=8)  # several bands a thread
    assert torch.equal(sums(wide, long), (wide.double() @ long.double()).int())


def test_products_that_tiles_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another operand broadcasts, one of too few rows, an empty one: the same integers."""
    a, b = integers(torch.int8, 1, 5, 8, seed=1), integers(torch.int8, 8, 4, seed=2)
    expected = (a.double() @ b.double()).int()
    module = ProductRows([PUSH, BESIDE, ADD], (), torch.int32, 0, False)
    many = integers(torch.int8, 3, 5, 4, seed=4)
    assert torch.equal(module(a, b, many), expected + many)
    assert module(a[:0], b, many[:0]).shape == (0, 5, 4)
    monkeypatch.setattr(product_rows, "ROWS_OF_TILES", 10**6)
    monkeypatch.setattr(product_rows, "_kernel", lambda: pytest.fail("too few rows for tiles"))
    assert torch.equal(module(a, b, many[:1]), expected + many[:1])


def test_a_copy_computes_the_same() -> None:
    a, b = integers(torch.int8, 9, 8, seed=1), integers(torch.int8, 8, 4, seed=2)
    module = ProductRows([PUSH, Step(Op.NEG)], (), torch.int32, 0, True)
    assert torch.equal(copy.deepcopy(module)(a, b), -(a.double() @ b.double()).int())


def test_operands_that_do_not_fit_are_refused() -> None:
    module = ProductRows([PUSH], (), torch.int32, 0, True)
    a = integers(torch.int8, 9, 8, seed=1)
    for b in (integers(torch.int8, 7, 4, seed=2), integers(torch.uint8, 8, 4, seed=2)):
        with pytest.raises(ValueError, match=r"product of \[9, 8\] .* and as many columns as rows"):
            module(a, b)
