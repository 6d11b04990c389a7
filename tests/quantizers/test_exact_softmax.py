"""The softmax and the norm of a simulation: exact in evaluation, the floating-point op elsewhere, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.reproducible import layer_norm, softmax_on_grid
from quantsim.quantizers.exact_op import ExactOp
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State

NORM = ([16], torch.linspace(0.5, 1.5, 16), torch.linspace(-1, 1, 16), 1e-12, False)
KINDS = {"softmax": (ExactSoftmax, (-1,)), "norm": (ExactNorm, NORM)}


def made(kind: str, bits: int = 8) -> tuple[ExactOp, Tensor, tuple[object, ...]]:
    quantizer = FakeQuantizer(QuantSpec(bits), "x")
    quantizer.set_range(torch.tensor(-5.0), torch.tensor(3.0))
    torch.manual_seed(3)
    with torch.no_grad():
        x = quantizer(2 * torch.randn(6, 11, 16))
    op, options = KINDS[kind]
    return op(quantizer).eval(), x, options


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_it_is_its_equation(kind):
    op, x, options = made(kind)
    found = op(x, *options)
    expected = softmax_on_grid(x, op.quantizers[0].affine_params().scale) if kind == "softmax" else layer_norm(x, *NORM[:4])
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, op.in_float(x, *options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_elsewhere_it_is_the_floating_point_op(kind):
    op, x, options = made(kind)
    expected = op.in_float(x, *options)
    assert torch.equal(op.train()(x, *options), expected)
    op.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x, *options), op.in_float(x, *options))
    wide = tuple(t.double() if isinstance(t, Tensor) else t for t in options)
    assert op(x.double(), *wide).dtype == torch.float64
    op.quantizers[0].state = State.OFF
    assert torch.equal(op(x, *options), expected)


def test_a_softmax_of_16_bits_is_the_floating_point_op():
    op, x, options = made("softmax", bits=16)
    assert torch.equal(op(x, *options), x.softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_floating_point_op(kind):
    op, x, options = made(kind)
    g, leaves = torch.randn(x.shape), [x.clone().requires_grad_() for _ in range(2)]
    y = op(leaves[0], *options)
    y.backward(g)
    op.in_float(leaves[1], *options).backward(g)
    assert torch.equal(y.detach(), op(x, *options))
    assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
