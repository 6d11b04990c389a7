"""Programs over rows against the functions that their steps are named after: bit for bit, over whole grids and at the extremes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantsim.kernels.batched import batched_matmul, missing_for_batches
from quantsim.kernels.integer_rows import IntegerRows, Op, Step, missing_for_rows
from quantsim.numerics.dyadic import channel_rescale, dyadic, rescale, rescale_channels
from quantsim.numerics.polynomial import (
    ERF_BITS,
    ERFC_AT_0,
    EXP_NUMBERS,
    EXP_OF_0,
    EXP_SCALE,
    EXP_ZERO,
    GELU_BITS,
    TANH_BITS,
    i_gelu,
    i_normalize,
    i_softmax,
    i_tanh,
    norm_constants,
)

rows_kernel = pytest.mark.skipif(bool(missing_for_rows()), reason=missing_for_rows())
batches_kernel = pytest.mark.skipif(bool(missing_for_batches()), reason=missing_for_batches())
PUSH = Step(Op.PUSH, (0,))


def run(steps: list[Step], *operands: Tensor, constants: tuple[Tensor, ...] = (), dtype: torch.dtype = torch.int32) -> Tensor:
    result: Tensor = IntegerRows(steps, constants, dtype)(*operands)
    return result


def wide(seed: int, *shape: int, bits: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**bits), 2**bits + 1, shape, generator=generator, dtype=torch.int32)


@rows_kernel
@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(1e-6, 50), bits=st.integers(1, 30), zero=st.integers(-128, 127), seed=st.integers(0, 99))
def test_rescale(ratio: float, bits: int, zero: int, seed: int) -> None:
    numbers = dyadic(ratio, 2**bits, -127, 120).numbers
    q = torch.cat([wide(seed, 3, 61, bits=bits), torch.full((3, 2), 2**bits), torch.full((3, 2), -(2**bits))], 1).to(torch.int32)
    found = run([PUSH, Step(Op.RESCALE, (*map(int, numbers), zero))], q)
    assert torch.equal(found, rescale(q, *numbers, zero_point=zero))


@rows_kernel
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 99), bits=st.integers(1, 31), top=st.floats(1e-3, 1e6))
def test_channels(seed: int, bits: int, top: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, bound = 37, torch.full((37,), 2.0**bits - (bits == 31), dtype=torch.float64)
    ratio = (torch.rand(width, generator=generator, dtype=torch.float64) - 0.5) * 2 * top / bound
    offset = (torch.rand(width, generator=generator, dtype=torch.float64) - 0.5) * top
    numbers = channel_rescale(ratio, offset, bound)
    q = torch.cat([wide(seed, 5, width, bits=bits - 1), bound[None].to(torch.int32), -bound[None].to(torch.int32)]).to(torch.int32)
    step = Step(Op.CHANNELS, (numbers.shift, -128, 127), (0, 1))
    found = run([PUSH, step], q, constants=(numbers.multiplier, numbers.offset), dtype=torch.int8)
    assert torch.equal(found, rescale_channels(q, numbers.multiplier, numbers.offset, numbers.shift, -128, 127, torch.int8))


@rows_kernel
def test_gelu_and_tanh_over_every_integer_that_is_not_past_their_ends() -> None:
    ends = torch.tensor([-(2**31) + 1, 2**31 - 1, -(2**30), 2**30], dtype=torch.int32)
    q = torch.cat([torch.arange(-(2**15), 2**15, dtype=torch.int32), ends]).reshape(4, -1)
    assert torch.equal(run([PUSH, Step(Op.GELU, (GELU_BITS, ERF_BITS, ERFC_AT_0))], q), i_gelu(q))
    q = torch.cat([torch.arange(-(2**19), 2**19, dtype=torch.int32), ends]).reshape(4, -1)
    assert torch.equal(run([PUSH, Step(Op.TANH, (*EXP_NUMBERS, EXP_OF_0, TANH_BITS))], q), i_tanh(q))


@rows_kernel
@settings(max_examples=100, deadline=None)
@given(width=st.sampled_from([1, 2, 15, 64, 384, 1000]), scale=st.floats(1e-7, 10), seed=st.integers(0, 99), bits=st.integers(0, 21))
def test_normalize(width: int, scale: float, seed: int, bits: int) -> None:
    k, e = norm_constants(width, scale, 1e-12)
    constant, extreme = torch.full((1, width), 2**21, dtype=torch.int32), torch.full((1, width), -(2**21), dtype=torch.int32)
    extreme[:, ::2] = 2**21
    q = torch.cat([wide(seed, 4, width, bits=bits), constant, -constant, extreme])
    assert torch.equal(run([PUSH, Step(Op.NORMALIZE, (k, e, 42 - k))], q), i_normalize(q, k, e))


@rows_kernel
@settings(max_examples=100, deadline=None)
@given(width=st.sampled_from([1, 3, 16, 128, 513]), scale=st.floats(1e-6, 1), seed=st.integers(0, 99), bits=st.integers(0, 29))
def test_softmax(width: int, scale: float, seed: int, bits: int) -> None:
    q = wide(seed, 2, 3, width, bits=bits)
    q[0, 0] = -(2**29)  # a row whose keys are all hidden
    least = min(math.ceil(EXP_ZERO / scale), 2**30)
    numbers = dyadic(min(scale / EXP_SCALE, 2 * EXP_ZERO / EXP_SCALE), least)
    found = run([PUSH, Step(Op.SOFTMAX, (*EXP_NUMBERS, -least, numbers.multiplier, numbers.shift, int(numbers.wide)))], q)
    assert torch.equal(found, i_softmax(q, -least, numbers.multiplier, numbers.shift, numbers.wide))


@rows_kernel
def test_sums_masks_and_other_strides() -> None:
    """A residual, a mask that is broadcast over heads and queries, 8-bit types, and operands that are not contiguous."""
    scores, other = wide(1, 2, 3, 5, 7), wide(2, 7, 5, 3, 2).permute(3, 2, 1, 0)
    mask = torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    small = wide(4, 1, 5, 7, bits=6).to(torch.int8)
    push = [Step(Op.PUSH, (i,)) for i in range(4)]
    steps = [push[3], push[0], push[1], Step(Op.ADD), Step(Op.WHERE, (-99, 0)), push[2], Step(Op.SUB, (5,)), Step(Op.NEG), Step(Op.ADD)]
    found = run(steps, scores, other, small, mask)
    assert torch.equal(found, torch.where(mask, scores + other, -99) - (small.int() - 5))
    clamped = run([push[0], Step(Op.CLAMP, (-128, 127))], other, dtype=torch.int8)
    assert torch.equal(clamped, other.clamp(-128, 127).to(torch.int8))
    ids = torch.arange(0, 256, dtype=torch.int32).to(torch.uint8).reshape(16, 16).t()
    assert torch.equal(run([PUSH], ids), ids.int())
    column = wide(5, 4, 1)
    assert torch.equal(run([push[0], push[1], Step(Op.ADD)], column, wide(6, 4, 9)), column + wide(6, 4, 9))


@rows_kernel
def test_an_empty_batch_a_copy_and_programs_that_make_no_sense() -> None:
    multiplier, offset = torch.full((3,), 2**21), torch.zeros(3, dtype=torch.int64)
    module = IntegerRows([PUSH, Step(Op.CHANNELS, (20, -9, 9), (0, 1))], (multiplier, offset), torch.int32)
    q = torch.tensor([[1, -2, 3]], dtype=torch.int32)
    assert module(q[:0]).shape == (0, 3)
    assert module(q).tolist() == [[2, -4, 6]]
    assert copy.deepcopy(module)(q).tolist() == [[2, -4, 6]]
    assert "push channels -> int32" in repr(module)
    for other in (module, copy.deepcopy(module)):  # one that has run, and one that has not
        with pytest.raises(ValueError, match=r"a rescale of 3 channels of torch.int64; expected int64, and the rows' 2 elements"):
            other(q[:, :2])
    with pytest.raises(ValueError, match="leaves 2 of them; expected one"):
        IntegerRows([PUSH, PUSH], (), torch.int32)


def test_no_kernel_elsewhere_than_on_a_cpu() -> None:
    assert "not for cuda" in missing_for_rows("cuda")


@batches_kernel
@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 70), st.integers(1, 40)),
    left=st.sampled_from([torch.int8, torch.uint8]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_batch_of_products(sizes: tuple[int, int, int, int], left: torch.dtype, transposed: bool, seed: int) -> None:
    batch, m, k, n = sizes
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if left == torch.int8 else (0, 256)
    a = torch.randint(low, high, (batch, m, k), generator=generator).to(left)
    b = torch.randint(-128, 128, (batch, n, k) if transposed else (batch, k, n), generator=generator).to(torch.int8)
    if seed % 3 == 0:
        a, b = torch.full_like(a, high - 1 if seed % 2 else low), torch.full_like(b, -128)
    b = b.transpose(1, 2) if transposed else b
    assert torch.equal(batched_matmul(a, b), (a.double() @ b.double()).int())


@batches_kernel
def test_a_batch_of_heads_as_attention_has_them() -> None:
    q = torch.randint(-128, 128, (2, 9, 3, 16), dtype=torch.int8).transpose(1, 2).flatten(0, 1)  # copies
    k = torch.randint(-128, 128, (2, 9, 3, 16), dtype=torch.int8).transpose(1, 2)[0].transpose(1, 2)
    assert torch.equal(batched_matmul(q[:3], k), (q[:3].double() @ k.double()).int())
    assert torch.equal(
        batched_matmul(q[:, :, ::2], q.transpose(1, 2)[:, ::2]), (q[:, :, ::2].double() @ q.transpose(1, 2)[:, ::2].double()).int()
    )
