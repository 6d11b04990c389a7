"""Integers in storage: the arithmetic of ``fake_quantize``, to the bit, over whole grids."""

from __future__ import annotations

import pytest
import torch

from quantsim import QuantSpec
from quantsim.kernels.edges import Grid, from_integers, look_up, on_grid, to_integers
from quantsim.numerics.affine import affine_params, fake_quantize, quantize

SPECS = [QuantSpec(bits=bits, symmetric=symmetric) for bits in (2, 4, 8) for symmetric in (False, True)]


def grid_of(spec: QuantSpec, low: float, high: float) -> tuple[Grid, object]:
    params = affine_params(torch.tensor(low), torch.tensor(high), spec)
    return Grid.of(params), params


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("low, high", [(-1.7, 3.1), (0.0, 1.0), (-5.0, 0.0), (-1e-30, 1e-30), (-0.3, 1e6)])
def test_integers_there_and_back_are_fake_quantize_to_the_bit(spec, low, high):
    grid, params = grid_of(spec, low, high)
    x = torch.cat([torch.linspace(2 * low - 1, 2 * high + 1, 4097), torch.tensor([0.0, -0.0, low, high])])
    q = to_integers(x, *grid.numbers)
    assert q.dtype == grid.dtype == (torch.int8 if spec.symmetric else torch.uint8)
    assert torch.equal(q.int(), quantize(x, params))
    assert torch.equal(from_integers(q, grid.scale, grid.zero_point), fake_quantize(x, params))
    assert torch.equal(on_grid(x, *grid.numbers), fake_quantize(x, params))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_integer_of_the_grid_comes_back_as_itself(spec):
    grid, _ = grid_of(spec, -2.5, 4.25)
    every = torch.arange(grid.quant_min, grid.quant_max + 1).to(grid.dtype)
    assert torch.equal(to_integers(from_integers(every, grid.scale, grid.zero_point), *grid.numbers), every)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_table_holds_its_function_at_every_integer(spec):
    grid, _ = grid_of(spec, -2.5, 4.25)
    every = torch.arange(grid.quant_min, grid.quant_max + 1).to(grid.dtype)
    table = torch.tanh(from_integers(every, grid.scale, grid.zero_point))
    shuffled = every[torch.randperm(len(every))].reshape(2, -1)
    assert torch.equal(look_up(shuffled, table, grid.quant_min), torch.tanh(from_integers(shuffled, grid.scale, grid.zero_point)))
