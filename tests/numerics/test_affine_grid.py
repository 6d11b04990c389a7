"""Affine quantization, forward: every integer of every grid, the error inside a range, the ends outside of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, dequantize, fake_quantize, grid_range, quantize

BITS = [2, 3, 4, 8, 16]
KINDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]
RANGES = [(-0.7, 1.9), (-3.1, 0.2), (0.4, 5.0), (-2.0, -0.3)]
EPS = torch.finfo(torch.float32).eps


def params_of(low: float, high: float, spec: QuantSpec) -> AffineParams:
    return affine_params(torch.tensor(low), torch.tensor(high), spec)


def integers(spec: QuantSpec) -> Tensor:
    return torch.arange(spec.quant_min, spec.quant_max + 1, dtype=torch.int32)


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_the_grid_has_two_to_the_bits_integers(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    assert len(integers(spec)) == 2**bits
    assert spec.quant_min == (-(2 ** (bits - 1)) if symmetric else 0)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_integer_of_the_grid_comes_back(bits: int, symmetric: bool, low: float, high: float) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    params = params_of(low, high, spec)
    values = dequantize(integers(spec), params)
    assert torch.equal(quantize(values, params), integers(spec))
    assert torch.equal(fake_quantize(values, params), values)
    assert values.unique().numel() == 2**bits


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_integer_comes_back_per_channel(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, axis=1)
    low, high = (torch.tensor(ends) for ends in zip(*RANGES, strict=True))
    params = affine_params(low, high, spec)
    q = integers(spec)[:, None].expand(-1, len(RANGES))  # [2**bits, 4]
    values = dequantize(q, params)
    assert torch.equal(quantize(values, params), q)
    assert torch.equal(fake_quantize(values, params), values)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_error_inside_is_at_most_half_a_step(bits: int, symmetric: bool, low: float, high: float) -> None:
    params = params_of(low, high, QuantSpec(bits=bits, symmetric=symmetric))
    first, last = grid_range(params)
    x = torch.lerp(first, last, torch.rand(20_000))
    error = (x.double() - fake_quantize(x, params).double()).abs()
    assert (error <= params.scale.double() / 2 + 2 * EPS * x.abs()).all()
    assert error.max() > 0.45 * params.scale, "the bound was never neared: the test would not notice a finer grid"


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_outside_the_range_values_become_its_ends(bits: int, symmetric: bool, low: float, high: float) -> None:
    params = params_of(low, high, QuantSpec(bits=bits, symmetric=symmetric))
    first, last = grid_range(params)
    beyond = torch.tensor([0.51, 1.0, 1e3, 1e30]) * params.scale
    assert torch.equal(fake_quantize(first - beyond, params), first.expand(4))
    assert torch.equal(fake_quantize(last + beyond, params), last.expand(4))
    infinite = torch.tensor([-torch.inf, torch.inf])
    assert torch.equal(fake_quantize(infinite, params), torch.stack([first, last]))


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("bits", BITS)
def test_the_grid_covers_a_symmetric_range_whole(bits: int, low: float, high: float) -> None:
    first, last = grid_range(params_of(low, high, QuantSpec(bits=bits, symmetric=True)))
    assert first <= min(low, 0) * (1 - EPS)
    assert last >= max(high, 0) * (1 - EPS)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("bits", BITS)
def test_an_asymmetric_grid_misses_its_range_by_half_a_step_at_most(bits: int, low: float, high: float) -> None:
    params = params_of(low, high, QuantSpec(bits=bits))
    first, last = grid_range(params)
    slack = params.scale * (0.5 + 2**bits * EPS)
    assert (first - min(low, 0)).abs() <= slack
    assert (last - max(high, 0)).abs() <= slack


def test_symmetric_scale_uses_both_ends_of_the_uneven_grid() -> None:
    spec = QuantSpec(bits=8, symmetric=True)
    assert params_of(-12.8, 3.0, spec).scale.item() == pytest.approx(0.1)
    assert params_of(-3.0, 12.7, spec).scale.item() == pytest.approx(0.1)


@pytest.mark.parametrize("zero_point", [100, 101], ids=["even zero point", "odd zero point"])
def test_ties_go_to_even_before_the_zero_point_is_added(zero_point: int) -> None:
    params = params_of(-float(zero_point), 255.0 - zero_point, QuantSpec())
    assert params.scale.item() == 1.0
    assert params.zero_point.item() == zero_point
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    expected = torch.tensor([-4.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0])
    assert torch.equal(fake_quantize(x, params), expected)
    assert torch.equal(quantize(x, params), (expected + zero_point).int())


@pytest.mark.parametrize(("low", "zero_point"), [(-2.5, 2), (-3.5, 4)])
def test_a_zero_point_between_two_integers_goes_to_the_even_one(low: float, zero_point: int) -> None:
    params = params_of(low, low + 255.0, QuantSpec())
    assert (params.scale.item(), params.zero_point.item()) == (1.0, zero_point)


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_of_zeros_gets_a_scale_and_stays_zero(bits: int, symmetric: bool) -> None:
    params = params_of(0.0, 0.0, QuantSpec(bits=bits, symmetric=symmetric))
    assert params.scale > torch.finfo(torch.float32).tiny / 2**16
    assert torch.equal(fake_quantize(torch.zeros(7), params), torch.zeros(7))
    assert fake_quantize(torch.tensor([-1.0, 1.0]), params).abs().max() < 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_ordinary_range_is_used_as_it_is_in_every_dtype(dtype: torch.dtype) -> None:
    params = affine_params(torch.tensor(-1.0, dtype=dtype), torch.tensor(1.0, dtype=dtype), QuantSpec())
    assert params.scale.item() == pytest.approx(2 / 255, rel=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", [3, 8])
def test_per_channel_is_per_tensor_channel_by_channel(bits: int, symmetric: bool, axis: int) -> None:
    x = 3 * torch.randn(4, 5, 6)
    channels = x.shape[axis]
    low, high = -torch.rand(channels), torch.rand(channels) * 4
    together = fake_quantize(x, affine_params(low, high, QuantSpec(bits=bits, symmetric=symmetric, axis=axis)))
    for i in range(channels):
        alone = affine_params(low[i], high[i], QuantSpec(bits=bits, symmetric=symmetric))
        assert torch.equal(together.select(axis, i), fake_quantize(x.select(axis, i), alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_floats_are_quantized_in_float32_and_keep_their_dtype(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(1000)).to(dtype)
    params = params_of(-2.0, 3.0, QuantSpec())
    out = fake_quantize(x, params)
    assert out.dtype == dtype
    assert torch.equal(out, fake_quantize(x.float(), params).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integers_of_narrow_floats_are_those_that_are_simulated(dtype: torch.dtype) -> None:
    x = (40 * torch.randn(2000)).to(dtype)
    params = params_of(-1.0, 127.0, QuantSpec())
    assert torch.equal(dequantize(quantize(x, params), params), fake_quantize(x.float(), params))


def test_the_input_is_left_alone() -> None:
    x = torch.randn(100)
    before = x.clone()
    fake_quantize(x, params_of(-1.0, 1.0, QuantSpec()))
    assert torch.equal(x, before)


ends = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=150, deadline=None)
@given(a=ends, b=ends, bits=st.sampled_from(BITS), symmetric=st.booleans(), seed=st.integers(0, 2**16))
def test_any_range(a: float, b: float, bits: int, symmetric: bool, seed: int) -> None:
    """Zero is exact, quantizing twice changes nothing, order is kept, and the error is bounded, whatever the range."""
    params = params_of(min(a, b), max(a, b), QuantSpec(bits=bits, symmetric=symmetric))
    first, last = grid_range(params)
    x = torch.lerp(first, last, torch.rand(200, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2).sort().values
    out = fake_quantize(x, params)
    assert fake_quantize(torch.zeros(1), params).item() == 0.0
    assert torch.equal(fake_quantize(out, params), out)
    assert (out.diff() >= 0).all()
    slack = params.scale.double() / 2 + 2 * EPS * x.abs()
    assert ((x.clamp(first, last).double() - out.double()).abs() <= slack).all()
