"""``exact_range`` is the inverse of ``affine_params``, bit for bit; plain ends of the grid are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, grid_range
from quantsim.numerics.exact_range import exact_range

COUNT = 20_000
SPECS = [QuantSpec(bits=bits, symmetric=symmetric, axis=0) for bits in (2, 4, 8, 16) for symmetric in (True, False)]
ids = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits}-{'symmetric' if spec.symmetric else 'asymmetric'}")


def ranges() -> tuple[Tensor, Tensor]:
    """Around 0 and to one side of it, over 15 orders of magnitude, empty ones among them. ``[C]``"""
    size = torch.exp(4 * torch.randn(COUNT))
    low, high = -torch.rand(COUNT) * size, torch.rand(COUNT) * size
    low[:1000], high[500:1500] = 0, 0
    low[2000:4000] *= 1e-2
    high[4000:6000] *= 1e-2
    return low, high


def same(a: AffineParams, b: AffineParams) -> Tensor:
    return (a.scale == b.scale) & (a.zero_point == b.zero_point)


@ids
def test_every_range_comes_back_to_the_bit(spec: QuantSpec) -> None:
    params = affine_params(*ranges(), spec)
    assert same(affine_params(*exact_range(params, spec), spec), params).all()


def test_the_plain_ends_of_the_grid_do_not() -> None:
    spec = QuantSpec(axis=0)
    params = affine_params(*ranges(), spec)
    share = same(affine_params(*grid_range(params), spec), params).float().mean().item()
    assert 0.75 < share < 0.9


@ids
def test_the_ends_move_by_a_few_ulps_at_most(spec: QuantSpec) -> None:
    params = affine_params(*ranges(), spec)
    for by_width in (False, True):
        for end, moved in zip(grid_range(params), exact_range(params, spec, by_width=by_width), strict=True):
            assert ((end == 0) == (moved == 0)).all()
            assert ((moved - end).abs() <= end.abs() * 4 * 2**-23).all()


@ids
def test_a_second_time_gives_the_same_range(spec: QuantSpec) -> None:
    low, high = exact_range(affine_params(*ranges(), spec), spec)
    again = exact_range(affine_params(low, high, spec), spec)
    assert torch.equal(again[0], low)
    assert torch.equal(again[1], high)


@ids
def test_by_width_all_asymmetric_scales_come_back_and_most_symmetric_ones(spec: QuantSpec) -> None:
    """``width / steps`` leaves out one scale in about ``steps + 1``; what it leaves out is off by one bit."""
    params = affine_params(*ranges(), spec)
    low, high = exact_range(params, spec, by_width=True)
    steps = spec.quant_max - spec.quant_min
    scale = (high - low) / steps
    share = (scale != params.scale).float().mean().item()
    assert share == 0 if not spec.symmetric else share < 1 / steps
    assert ((scale - params.scale).abs() <= params.scale * 2**-23).all()


def test_one_range_per_tensor_keeps_its_shape() -> None:
    spec = QuantSpec()
    low, high = exact_range(affine_params(torch.tensor(-0.3), torch.tensor(1.7), spec), spec)
    assert low.shape == high.shape == ()


def test_a_scale_that_no_range_gives_gets_a_neighbour() -> None:
    """4 bits: ``width / 15`` takes steps of 16 / 15 ulp of the scale."""
    spec = QuantSpec(bits=4, axis=0)
    scale = torch.tensor([1.5]).repeat(64)
    for i in range(1, 64):
        scale[i] = torch.nextafter(scale[i - 1], torch.tensor(2.0))
    params = AffineParams(scale, torch.full((64,), 3.0), 0, 15, 0)
    given = affine_params(*exact_range(params, spec), spec)
    assert 1 <= (given.scale != scale).sum() <= 8
    assert ((given.scale - scale).abs() <= 2**-23).all()
    assert torch.equal(given.zero_point, params.zero_point)
