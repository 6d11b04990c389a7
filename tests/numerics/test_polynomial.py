"""The integer functions: error against float64 over their whole range, and exact agreement with Python's integers at the extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from quantsim.numerics import polynomial as p
from quantsim.numerics.dyadic import INT32_MAX, dyadic

INT32 = st.integers(-INT32_MAX, INT32_MAX)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def around(limit: int, count: int = 200_000) -> Tensor:
    """Integers over all magnitudes up to ``limit``, both signs."""
    sizes = torch.logspace(0, math.log10(limit), count, dtype=torch.float64).round().clamp(max=limit).to(torch.int32)
    return torch.cat([sizes, -sizes, torch.arange(-70000, 70000, dtype=torch.int32)])


# ---- errors ----


def test_gelu():
    q = around(INT32_MAX)
    x = q.double() * p.GELU_SCALE
    error = (p.i_gelu(q).double() * p.GELU_SCALE - functional.gelu(x)).abs()
    assert error.max() < 0.0184 < 0.02
    tail = x.abs() > 4
    assert error[tail].max() < 2e-4  # where erf is 1, GELU is x or 0


def test_erf():
    q = around(INT32_MAX)
    error = (p.i_erf(q).double() / 2**p.ERF_BITS - torch.erf(q.double() * p.GELU_SCALE / math.sqrt(2))).abs()
    assert error.max() < 0.1


def test_exp():
    q = -torch.arange(0, 33 << p.EXP_BITS, dtype=torch.int32)
    error = (p.i_exp(q).double() * p.EXP_OUT_SCALE - (q.double() * p.EXP_SCALE).exp()).abs()
    assert error.max() < 0.002
    assert p.i_exp(ints(0, -INT32_MAX)).tolist() == [p.EXP_OF_0, 0]
    assert (p.i_exp(q[math.ceil(p.EXP_ZERO / p.EXP_SCALE) :]) == 0).all()


def test_tanh():
    q = around(INT32_MAX)
    error = (p.i_tanh(q).double() * p.TANH_OUT_SCALE - torch.tanh(q.double() * p.TANH_SCALE)).abs()
    assert error.max() < 0.002
    assert p.i_tanh(ints(0, INT32_MAX, -INT32_MAX)).tolist() == [0, 2**15, -(2**15)]


def softmax(q: Tensor, scale: float, dim: int = -1) -> Tensor:
    least = math.ceil(p.EXP_ZERO / scale)
    d = dyadic(scale / p.EXP_SCALE, least)
    return p.i_softmax(q, -least, d.multiplier, d.shift, d.wide, dim)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 0.01, 0.3])
@pytest.mark.parametrize("keys", [1, 2, 128, 5000])
def test_softmax(scale, keys):
    generator = torch.Generator().manual_seed(keys)
    x = torch.randn(32, keys, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1.5, 32).double()[:, None]
    q = (x / scale).round().to(torch.int32)
    error = (softmax(q, scale).double() * p.SOFTMAX_SCALE - (q.double() * scale).softmax(-1)).abs()
    assert error.max() < 0.0025


def test_softmax_of_hidden_keys():
    """Hidden keys weigh exactly 0, a row of them alone is uniform, and the only key has all the weight, to a step of 2**-15."""
    q = ints(5, -60000, -60000, -60000).expand(1, 4)
    assert softmax(q, 1e-3).tolist() == [[2**15 - 1, 0, 0, 0]]
    assert softmax(torch.full((1, 4), -(2**29), dtype=torch.int32), 1e-3).tolist() == [[2**13 - 1] * 4]
    assert softmax(ints(3), 1e-3).tolist() == [2**15 - 1]


def test_softmax_along_another_axis():
    q = torch.randint(-9000, 9000, (3, 5, 2), dtype=torch.int32)
    assert torch.equal(softmax(q, 1e-3, 1), softmax(q.transpose(1, 2), 1e-3).transpose(1, 2))


@pytest.mark.parametrize("width", [1, 2, 16, 384, 768, 4096, 2**17])
@pytest.mark.parametrize("spread", [3.0, 1e3, 2**17])
def test_normalize(width, spread):
    generator = torch.Generator().manual_seed(width)
    q = (torch.randn(8, width, generator=generator, dtype=torch.float64) * spread).round().clamp(-(2**21), 2**21).to(torch.int32)
    k, e = p.norm_constants(width, 1e-4, 1e-5)
    found = p.i_normalize(q, k, e).double() * p.norm_scale(width)
    expected = functional.layer_norm(q.double() * 1e-4, [width], eps=1e-5)
    sigma = (q.double().var(-1, keepdim=True, correction=0) + 1e-5 / 1e-4**2).sqrt()  # in steps
    grain = 2 * p.norm_scale(width) + (0.5 + 2.0**-k) / sigma * expected.abs().max().clamp(min=1)
    assert ((found - expected).abs() <= grain).all()


def test_eps_counts_where_the_row_is_small():
    q = ints(*range(-8, 8)).reshape(1, 16)
    k, e = p.norm_constants(16, 1e-3, 1e-4)  # variance 2.1e-5, a fifth of eps
    found = p.i_normalize(q, k, e).double() * p.norm_scale(16)
    torch.testing.assert_close(found, functional.layer_norm(q.double() * 1e-3, [16], eps=1e-4), rtol=0, atol=0.05)


@pytest.mark.parametrize("value", [0, 1, -(2**21), 2**21])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e30])
def test_a_constant_row_is_0(value, eps):
    k, e = p.norm_constants(768, 1e-5, eps)
    assert p.i_normalize(torch.full((2, 768), value, dtype=torch.int32), k, e).abs().max() == 0


def test_a_norm_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="131073 elements"):
        p.norm_constants(2**17 + 1, 1.0, 1e-5)


# ---- exact integers at the extremes ----


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.integers(0, 2**62 - 1), st.integers(1, 2**31 - 1).map(lambda r: r * r), st.integers(1, 2**31 - 1).map(lambda r: r * r - 1))
)
def test_sqrt_is_exact(n):
    assert p.i_sqrt(torch.tensor([n])).item() == math.isqrt(n)


def test_sqrt_of_every_small_number_and_around_every_power_of_two():
    edges = [max(0, min(2**62 - 1, 2**i + j)) for i in range(63) for j in (-1, 0, 1)]
    n = torch.cat([torch.arange(100_000), torch.tensor(edges)])
    assert p.i_sqrt(n).tolist() == [math.isqrt(x) for x in n.tolist()]


@settings(max_examples=300, deadline=None)
@given(INT32)
def test_gelu_is_exact(q):
    m = min(abs(q), 2**14)
    u = 2**14 - m
    erfc = ((u * u >> 13) * p.ERFC_AT_0) >> 15
    assert p.i_gelu(ints(q)).item() == max(q, 0) - ((m * erfc + 2**15) >> 16)


@settings(max_examples=300, deadline=None)
@given(st.integers(-INT32_MAX, 0))
def test_exp_and_tanh_are_exact(q):
    b, c = round(p.EXP_B / p.EXP_SCALE), round(p.EXP_C / p.EXP_A / p.EXP_SCALE**2)
    z, rest = divmod(-q, 2**14)
    e = ((((b - rest) ** 2 + c) >> 14) + 2 ** min(z, 29)) >> (min(z, 29) + 1)
    assert p.i_exp(ints(q)).item() == e
    assert (b**2 + c) < 2**31
    assert p.i_tanh(ints(q, -q)).tolist() == [-t for t in p.i_tanh(ints(-q, q)).tolist()]
    assert abs(p.i_tanh(ints(q)).item()) == ((p.EXP_OF_0 - e) << 15) // (p.EXP_OF_0 + e)


@settings(max_examples=100, deadline=None)
@given(row=st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=40), scale=st.sampled_from([1e-7, 1e-3, 0.5, 50.0]))
def test_softmax_is_exact(row, scale):
    least = math.ceil(p.EXP_ZERO / scale)
    d = dyadic(min(scale / p.EXP_SCALE, 2 * p.EXP_ZERO / p.EXP_SCALE), least)
    x = [max(q - max(row), -least) for q in row]
    e = [p.i_exp(ints(max((v * d.multiplier + (1 << d.shift >> 1)) >> d.shift, -(31 << 14)))).item() for v in x]
    r = (2**31 - 2**15 - 1) // sum(e)
    assert p.i_softmax(ints(*row), -least, d.multiplier, d.shift, d.wide).tolist() == [(v * r + 2**15) >> 16 for v in e]


LIMIT = 2**21
ROWS = st.one_of(
    st.lists(st.integers(-LIMIT, LIMIT), min_size=1, max_size=50),
    st.lists(st.sampled_from([-LIMIT, LIMIT]), min_size=1, max_size=50),
    st.integers(1, 600).map(lambda n: [LIMIT] + [-LIMIT] * n),
)


@settings(max_examples=200, deadline=None)
@given(row=ROWS, eps=st.sampled_from([0.0, 1e-12, 1e-5, 1e9]), scale=st.sampled_from([1e-9, 1e-4, 10.0]))
def test_normalize_is_exact(row, eps, scale):
    k, e = p.norm_constants(len(row), scale, eps)
    n = len(row)
    mean = (2 * sum(row) + n) // (2 * n)
    y = [q - mean for q in row]
    s = math.isqrt((sum(v * v for v in y) << (2 * k)) + e)
    expected = [(v * (2**62 // s) + (1 << (41 - k))) >> (42 - k) for v in y]
    assert p.i_normalize(ints(*row), k, e).tolist() == expected
    assert max(map(abs, expected)) <= 2**p.NORM_BITS
    assert (n * 2**44 << (2 * k)) <= 2**61
