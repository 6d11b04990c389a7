"""Softmax and layer norm against float64, on every grid value, and in any order of their terms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from quantsim.numerics.reproducible import exp_table, layer_norm, softmax_on_grid


@pytest.mark.parametrize("scale", [1e-6, 0.01, 0.05, 0.5, 3.0])
def test_every_entry_of_the_table_is_exp_rounded_once(scale):
    expected = [torch.exp(torch.tensor(-i * scale, dtype=torch.float64)).float().item() for i in range(256)]
    assert exp_table(scale).tolist() == expected


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.4, 20.0])
def test_softmax_on_every_value_of_a_grid(scale):
    steps, step = torch.arange(-200, 56)[torch.randperm(256)].reshape(4, 64), torch.tensor(scale)  # float32
    expected = (steps.double() * step.double()).softmax(-1)
    torch.testing.assert_close(softmax_on_grid(steps * step, step).double(), expected, rtol=3e-7, atol=1e-38)


def test_the_order_of_terms_does_not_show():
    torch.manual_seed(0)
    x, order = torch.randint(-200, 56, (500, 300)) * 0.03, torch.randperm(300)
    assert torch.equal(softmax_on_grid(x, 0.03)[:, order], softmax_on_grid(x[:, order], 0.03))
    x = torch.randn(500, 300)
    assert torch.equal(layer_norm(x, [300])[:, order], layer_norm(x[:, order], [300]))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(layer_norm(x, [300]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_rows_that_hold_nan_are_nan_and_no_others():
    x = torch.zeros(3, 5)
    x[1, 2] = float("nan")
    assert softmax_on_grid(x, 0.1).isnan().any(-1).tolist() == [False, True, False]
    assert layer_norm(x, [5]).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(7, 384), (2, 3, 768), (5, 4, 6)], ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("far", [0.0, 50.0])
def test_layer_norm_against_float64(shape, eps, far):
    torch.manual_seed(1)
    axes = shape[1:] if shape[-1] == 6 else shape[-1:]
    x, weight, bias = torch.randn(shape) * 3 + far, torch.randn(axes), torch.randn(axes)
    expected = functional.layer_norm(x.double(), axes, weight.double(), bias.double(), eps)
    torch.testing.assert_close(layer_norm(x, axes, weight, bias, eps).double(), expected, rtol=1e-5, atol=5e-6 * (1 + far / 3))


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_a_constant_row_is_the_bias_alone(eps):
    bias = torch.randn(8)
    assert torch.equal(layer_norm(torch.full((2, 8), 0.5), [8], torch.ones(8), bias, eps), bias.expand(2, 8))
    assert layer_norm(torch.full((2, 8), 0.5), [8]).abs().max() == 0
