"""A product of two activations in a simulation: integers in evaluation, floats elsewhere, the float product's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.quantizers.exact_matmul import ExactMatmul
from quantsim.quantizers.fake_quantizer import FakeQuantizer


def quantizers(bits: int = 8) -> tuple[FakeQuantizer, FakeQuantizer]:
    made = FakeQuantizer(QuantSpec(bits), "a"), FakeQuantizer(QuantSpec(bits), "b")
    for quantizer, low in zip(made, (-1.3, -0.2), strict=True):
        quantizer.set_range(torch.tensor(low), torch.tensor(1.7))
    return made


def on_grids(product: ExactMatmul, m: int = 5, k: int = 32, n: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(k)
    a, b = torch.randn(2, 3, m, k), torch.randn(2, 3, k, n)
    with torch.no_grad():
        return product.quantizers[0](a), product.quantizers[1](b)


def written_out(product: ExactMatmul, a: Tensor, b: Tensor) -> Tensor:
    """In float64, which holds every sum; rounded where the module rounds."""
    s_a, s_b = (quantizer.affine_params().scale for quantizer in product.quantizers)
    total = (a / s_a).round().double() @ (b / s_b).round().double()
    return total.float() * (s_a * s_b)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 32, 258, 259, 1000])
def test_the_sum_is_exact(k):
    product = ExactMatmul(*quantizers()).eval()
    a, b = on_grids(product, k=k)
    assert torch.equal(product(a, b), written_out(product, a, b))


@torch.no_grad()
def test_largest_sums():
    product = ExactMatmul(*quantizers()).eval()
    product.quantizers[0].set_range(torch.tensor(0.0), torch.tensor(255.0))
    product.quantizers[1].set_range(torch.tensor(0.0), torch.tensor(255.0))
    a, b = torch.full((1, 2, 258), 255.0), torch.full((1, 258, 2), 255.0)
    b[:, -1] = 254.0
    assert torch.equal(product(a, b), (a.double() @ b.double()).float())


@torch.no_grad()
def test_floats_in_training_with_16_bits_under_autocast_and_in_float64():
    product = ExactMatmul(*quantizers())
    a, b = on_grids(product)
    assert torch.equal(product.train()(a, b), a @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product.eval()(a, b), a @ b)
    assert product(a.double(), b.double()).dtype == torch.float64
    assert torch.equal(ExactMatmul(*quantizers(bits=16)).eval()(a, b), a @ b)


@pytest.mark.parametrize("of_a, of_b", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_the_float_product(of_a, of_b):
    product = ExactMatmul(*quantizers()).eval()
    a, b = on_grids(product)
    b = b[:1]  # broadcast: its gradient is summed
    found = [x.clone().requires_grad_(of) for x, of in ((a, of_a), (b, of_b))]
    expected = [x.clone().requires_grad_(of) for x, of in ((a, of_a), (b, of_b))]
    g = torch.randn(2, 3, 5, 7)
    y = product(*found)
    y.backward(g)
    (expected[0] @ expected[1]).backward(g)
    assert torch.equal(y.detach(), written_out(product, a, b))
    for x, other in zip(found, expected, strict=True):
        assert (x.grad is None) == (other.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, other.grad)
