"""Gradients of the input, min and max, against autograd of the formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import affine_params, fake_quantize

SPECS = [
    pytest.param(QuantSpec(bits=bits, symmetric=symmetric, axis=axis), id=f"{bits}-bit-{'sym' if symmetric else 'asym'}-axis-{axis}")
    for bits in (2, 4, 8, 16)
    for symmetric in (True, False)
    for axis in (None, 0, 1, -1)
]
SPREADS = [pytest.param(0.5, id="inside"), pytest.param(1.5, id="both"), pytest.param(40.0, id="far outside")]


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def written_out(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The module's equation and nothing else; the range is forced to hold 0."""
    if spec.axis is not None:
        shape = [1] * x.ndim
        shape[spec.axis] = -1
        low, high = low.reshape(shape), high.reshape(shape)
    low, high = torch.minimum(low, torch.zeros_like(low)), torch.maximum(high, torch.zeros_like(high))
    if spec.symmetric:
        scale = torch.maximum(high / spec.quant_max, low / spec.quant_min)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / (spec.quant_max - spec.quant_min)
        zero_point = spec.quant_min - straight_through(low / scale)
    q = torch.clamp(straight_through(x / scale) + zero_point, spec.quant_min, spec.quant_max)
    return (q - zero_point) * scale


def ours(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    return fake_quantize(x, affine_params(low, high, spec))


def gradients(formula, x: Tensor, low: Tensor, high: Tensor, g: Tensor, spec: QuantSpec) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, low, high)]
    out = formula(*leaves, spec)
    grads = torch.autograd.grad(out, leaves, g.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))]


def case(spec: QuantSpec, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(6, 7, 8, dtype=torch.float64) * spread
    channels = () if spec.axis is None else (x.shape[spec.axis],)
    low = -1.0 - torch.rand(channels, dtype=torch.float64)
    high = 2.2 + torch.rand(channels, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, low, high, torch.randn_like(x)))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("spec", SPECS)
def test_float64_equals_autograd_of_the_formula(spec: QuantSpec, spread: float) -> None:
    inputs = case(spec, spread, torch.float64)
    expected, actual = gradients(written_out, *inputs, spec), gradients(ours, *inputs, spec)
    for name, a, b in zip(("output", "x", "min", "max"), actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("spec", SPECS)
def test_float32_gradients_are_right_to_one_in_ten_thousand(spec: QuantSpec) -> None:
    """Against float64 at the same values. The tolerance is a share of ``sum |g|`` over the elements of a range."""
    x, low, high, g = case(spec, 1.5, torch.float32)
    actual = gradients(ours, x, low, high, g, spec)
    expected = gradients(written_out, *(t.double() for t in (x, low, high, g)), spec)
    torch.testing.assert_close(actual[1].double(), expected[1])
    sharing = g.abs().sum() if spec.axis is None else g.abs().movedim(spec.axis, 0).flatten(1).sum(1)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert ((a - b).abs() <= 1e-4 * sharing).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_float32_range_gradients_of_a_large_tensor(bits: int, symmetric: bool) -> None:
    """The gradient goes along with the values, so that ``sum g * q`` and ``sum g * y`` are large and nearly cancel."""
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x, low, high = torch.randn(300_000), torch.tensor(-3.0), torch.tensor(3.3)
    actual = gradients(ours, x, low, high, x, spec)
    expected = gradients(ours, x.double(), low.double(), high.double(), x.double(), spec)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=5e-3, abs=0.05)


def test_worked_example() -> None:
    """2 bits on [-1, 2]: scale 1, zero point 1, grid -1 0 1 2. By hand: ds = -1 + (0 - 0.4) + 2, dz = -2, then the chain rule."""
    x, low, high, spec = torch.tensor([-5.0, 0.4, 5.0]), torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(bits=2)
    out, grad_x, grad_low, grad_high = gradients(ours, x, low, high, torch.ones(3), spec)
    assert out.tolist() == [-1.0, 0.0, 2.0]
    assert grad_x.tolist() == [0.0, 1.0, 0.0]
    assert grad_high.item() == pytest.approx(2.6 / 3)
    assert grad_low.item() == pytest.approx(2.0 - 2.6 / 3)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_ends_of_the_grid_count_as_inside(symmetric: bool) -> None:
    spec = QuantSpec(bits=4, symmetric=symmetric)
    params = affine_params(torch.tensor(-1.5), torch.tensor(1.4), spec)
    ends = (torch.tensor([spec.quant_min, spec.quant_max]) - params.zero_point) * params.scale
    x = torch.cat([ends, ends + params.scale * torch.tensor([-0.6, 0.6])]).requires_grad_()
    fake_quantize(x, params).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_an_empty_range_has_finite_gradients() -> None:
    out, *grads = gradients(ours, torch.randn(9), torch.tensor(0.0), torch.tensor(0.0), torch.ones(9), QuantSpec())
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("axis", [None, 0])
def test_bfloat16_input_gets_a_bfloat16_gradient_and_the_range_a_float32_one(axis: int | None) -> None:
    spec = QuantSpec(axis=axis)
    x, low, high, g = case(spec, 1.5, torch.float32)
    out, grad_x, grad_low, grad_high = gradients(ours, x.bfloat16(), low, high, g, spec)
    wide = gradients(ours, x.bfloat16().float(), low, high, g.bfloat16().float(), spec)
    assert out.dtype == grad_x.dtype == torch.bfloat16
    assert grad_low.dtype == grad_high.dtype == torch.float32
    assert torch.equal(grad_x.float(), wide[1])
    torch.testing.assert_close(grad_low, wide[2], rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, low, high = torch.randn(50), torch.tensor(-1.0), torch.tensor(1.0, requires_grad=True)
    ours(x, low, high, QuantSpec()).sum().backward()
    assert high.grad is not None
    assert low.grad is None
    assert x.grad is None
