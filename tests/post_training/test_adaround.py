"""AdaRound: its objective against the written-out one in float64, its result on the grid, and that it beats rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantsim import QuantConfig, Rule
from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, fake_quantize, quantize
from quantsim.post_training.adaround import learn_rounding
from quantsim.post_training.layers import moments
from tests.post_training.outliers import noise, simulate


def layer(bits: int, axis: int | None = 0, out: int = 12, width: int = 24) -> tuple[Tensor, AffineParams, Tensor, Tensor]:
    """A weight, its grid, and inputs that depend on each other, exact and disturbed: ``[400, width]``."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(out, width, generator=generator)
    spec = QuantSpec(bits=bits, symmetric=True, axis=axis)
    ends = (weight.amin(1), weight.amax(1)) if axis == 0 else (weight.min(), weight.max())
    x = torch.randn(400, 5, generator=generator) @ torch.randn(5, width, generator=generator)
    x += 0.3 * torch.randn(400, width, generator=generator)
    return weight, affine_params(*ends, spec), x, x + 0.05 * torch.randn(400, width, generator=generator)


def output_error(weight: Tensor, w_hat: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
    """``E |w x - w_hat x_hat|^2`` of each row, in float64."""
    return (x.double() @ weight.double().T - x_hat.double() @ w_hat.double().T).square().mean(0)


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_neighbours_on_the_grid_and_quantize_to_themselves(bits: int, axis: int | None) -> None:
    weight, params, x, x_hat = layer(bits, axis)
    rounded = learn_rounding(weight, params, *moments([x], [x_hat], [{}]), steps=100)
    assert torch.equal(fake_quantize(rounded, params), rounded)
    steps = (rounded - weight) / params.broadcast(params.scale, 2)
    assert steps.abs().max() < 1.0001
    assert quantize(rounded, params).unique().numel() <= 2**bits


@pytest.mark.parametrize("bits", [3, 4])
def test_the_output_error_is_well_below_that_of_nearest(bits: int) -> None:
    weight, params, x, x_hat = layer(bits)
    rounded = learn_rounding(weight, params, *moments([x], [x_hat], [{}]), steps=400)
    nearest = output_error(weight, fake_quantize(weight, params), x, x_hat)
    learned = output_error(weight, rounded, x, x_hat)
    assert (learned <= nearest * (1 + 1e-4)).all()  # every row, for a row may keep nearest
    assert learned.sum() < 0.5 * nearest.sum()


def test_close_to_the_best_of_all_roundings() -> None:
    weight, params, x, x_hat = layer(4, width=12)
    rounded = learn_rounding(weight, params, *moments([x], [x_hat], [{}]), steps=1000)
    scale = params.scale[:, None]
    down = (weight / scale).floor()
    low, high = params.quant_min, params.quant_max
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)))
    every = (down[:, None] + choices).clamp(low, high) * scale[:, None]  # [12, 4096, 12]
    best = torch.stack([output_error(row.expand(4096, 12), tried, x, x_hat).min() for row, tried in zip(weight, every, strict=True)])
    learned = output_error(weight, rounded, x, x_hat)
    nearest = output_error(weight, fake_quantize(weight, params), x, x_hat)
    assert (learned >= best * (1 - 1e-4)).all()
    assert (learned - best).sum() <= 0.3 * (nearest - best).sum()


def test_moments_are_means_over_positions_that_are_not_padded() -> None:
    x, x_hat = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # each [3, 5, 4]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    gram, drift = moments([x, x[:1]], [x_hat, x_hat[:1]], [{"attention_mask": mask}, {}])
    a = torch.cat([x[mask.bool()], x[0]]).double()
    b = torch.cat([x_hat[mask.bool()], x_hat[0]]).double()
    torch.testing.assert_close(gram.double(), b.T @ b / len(b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(drift.double(), (a - b).T @ b / len(b), rtol=1e-5, atol=1e-6)


def test_it_helps_a_model_of_four_bit_weights() -> None:
    fine = Rule(role="activation", set={"bits": 16})
    config = QuantConfig.preset("aimet").with_rules(Rule(op="linear", role="weight", set={"bits": 4}), fine)
    assert noise(simulate(config, adaround=300)) < 0.7 * noise(simulate(config))
