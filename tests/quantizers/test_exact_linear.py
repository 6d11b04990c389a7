"""A simulation's linear on integers, against exact sums and against the floating-point linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantsim.config import QuantSpec
from quantsim.quantizers import exact_linear
from quantsim.quantizers.exact_linear import ExactLinear
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State, WeightQuantizer

OUT, WIDTH = 24, 700  # wider than what float32 adds exactly


def quantizers(bits: int = 8) -> tuple[FakeQuantizer, WeightQuantizer]:
    x, weight = FakeQuantizer(QuantSpec(bits=bits)), WeightQuantizer(QuantSpec(bits=8, symmetric=True, axis=0), "w", OUT)
    x.set_range(torch.tensor(-1.7), torch.tensor(2.9))
    weight.set_range(-torch.linspace(0.1, 0.5, OUT), torch.linspace(0.1, 0.5, OUT))
    return x, weight


@pytest.fixture
def layer() -> ExactLinear:
    return ExactLinear(*quantizers()).eval()


def on_grids(layer: ExactLinear, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 3, WIDTH, generator=generator), torch.randn(OUT, WIDTH, generator=generator) * 0.2
    with torch.no_grad():
        return layer.quantizers[0](x), layer.quantizers[1](weight), torch.randn(OUT, generator=generator)


def written_out(layer: ExactLinear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The docstring's equation: the sum over integers in float64, which holds it exactly, then four roundings."""
    of_x, of_weight = (quantizer.affine_params() for quantizer in layer.quantizers)
    r_x, r_w = (x / of_x.scale).round(), (weight / of_weight.scale[:, None]).round()
    total = (r_x.double() @ r_w.double().T).float()
    return total * (of_x.scale * of_weight.scale) + bias


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["", "none here"], ids=["kernel", "float32"])
def test_equals_its_equation_to_the_bit(layer, kernels, monkeypatch):
    if kernels:
        monkeypatch.setattr(exact_linear, "missing_for_int8", lambda device: kernels)
    x, weight, bias = on_grids(layer)
    expected = written_out(layer, x, weight, bias)
    assert torch.equal(layer(x, weight, bias), expected)
    assert torch.equal(layer(x[:5], weight, bias), expected[:5])
    assert not torch.equal(functional.linear(x, weight, bias), expected)  # what float sums give


def test_gradients_are_the_floating_point_linears(layer):
    x, weight, bias = on_grids(layer)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    g = torch.randn(*x.shape[:-1], OUT)
    found = layer(*inputs)
    assert torch.equal(found, written_out(layer, x, weight, bias))
    expected = torch.autograd.grad(functional.linear(*inputs), inputs, g)
    for of, like in zip(torch.autograd.grad(found, inputs, g), expected, strict=True):
        torch.testing.assert_close(of, like, rtol=1e-4, atol=1e-4)
    assert layer._packed is None  # a weight with a gradient is not kept


@torch.no_grad()
def test_is_the_plain_linear_where_there_are_no_grids(layer):
    x, weight, bias = on_grids(layer)
    plain = functional.linear(x, weight, bias)
    assert torch.equal(layer.train()(x, weight, bias), plain)
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, weight, bias).dtype == torch.bfloat16
    assert layer(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert layer(x[:0], weight, bias).shape == (0, 3, OUT)
    for quantizer in layer.quantizers:
        state, quantizer.state = quantizer.state, State.OFF
        assert torch.equal(layer(x, weight, bias), plain)
        quantizer.state = state
    assert torch.equal(ExactLinear(*quantizers(bits=16)).eval()(x, weight, bias), plain)


@torch.no_grad()
def test_follows_its_weight_and_its_ranges(layer):
    x, weight, bias = on_grids(layer)
    layer(x, weight, bias)
    other = layer.quantizers[1](weight * 0.5)
    assert torch.equal(layer(x, other, bias), written_out(layer, x, other, bias))
    layer.quantizers[0].set_range(torch.tensor(-3.0), torch.tensor(3.0))
    wider = layer.quantizers[0](x)
    assert torch.equal(layer(wider, other, bias), written_out(layer, wider, other, bias))


@torch.no_grad()
def test_a_copy_has_the_quantizers_of_the_copy(layer):
    x, weight, bias = on_grids(layer)
    expected = layer(x, weight, bias)
    copied, quantizer = copy.deepcopy((layer, layer.quantizers[0]))
    assert copied.quantizers[0] is quantizer is not layer.quantizers[0]
    assert torch.equal(copied(x, weight, bias), expected)
