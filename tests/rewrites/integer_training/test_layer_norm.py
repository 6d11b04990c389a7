"""Integer LayerNorm against float64 on the mapped operands, within the bound that its docstring states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantsim.numerics.fixed_point import FixedPointError
from quantsim.numerics.fused import fused_kernels
from quantsim.rewrites.integer_training.layer_norm import layer_norm
from quantsim.rewrites.integer_training.op import Mapper
from tests.rewrites.integer_training.mapped import BITS, U, leaf, mapper, value

EPS = [0.0, 1e-12, 1e-5, 1.0]


def in_float64(m: Mapper, x: Tensor, gamma: Tensor, beta: Tensor, g: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The result and the gradients of PyTorch's LayerNorm on the mapped values."""
    x64, gamma64 = value(m, x, "activation", axis=0).requires_grad_(), value(m, gamma, "weight").requires_grad_()
    beta64 = beta.detach().double().requires_grad_()
    y = functional.layer_norm(x64, (x.shape[-1],), gamma64, beta64, eps)
    y.backward(value(m, g, "gradient", axis=0))
    return y.detach(), x64.grad, gamma64.grad, beta64.grad  # type: ignore[return-value]


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("exponents", ["row", "tensor"])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_within_the_bound_of_float64(bits: tuple[int, int, int], exponents: str, scale: float, eps: float) -> None:
    m, width = mapper(bits, exponents=exponents), 96
    x = ((torch.randn(50, width) + 3 * torch.randn(50, 1)) * scale).requires_grad_()  # rows whose mean is larger than their spread
    gamma, beta, g = leaf(width), leaf(width), torch.randn(50, width)
    y = layer_norm(m, x, (width,), gamma, beta, eps)
    y.backward(g)
    y64, dx64, dgamma64, dbeta64 = in_float64(m, x, gamma, beta, g, eps)
    x64, gamma64, g64 = value(m, x, "activation", axis=0), value(m, gamma, "weight"), value(m, g, "gradient", axis=0)
    assert ((y - y64).abs() <= 6 * U * (y64 - beta).abs() + U * y64.abs()).all()
    rho = (x64.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    n, h = (x64 - x64.mean(-1, keepdim=True)) * rho, (g64 * gamma64).abs()
    sizes = h + h.mean(-1, keepdim=True) + n.abs() * (h * n.abs()).mean(-1, keepdim=True)
    assert ((x.grad - dx64).abs() <= 8 * U * rho * sizes).all()
    assert ((gamma.grad - dgamma64).abs() <= 60 * U * (g64 * n).abs().sum(0)).all()  # a float32 sum over 50 rows
    torch.testing.assert_close(beta.grad, dbeta64.float(), rtol=U if exponents == "row" else 0, atol=0)


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16)], ids=str)
def test_near_float_itself(bits: tuple[int, int, int]) -> None:
    """What mapping does: in first order ``|gamma| (1 + |n|) step / sigma + |n| step_gamma``, here with a fifth on top."""
    m, width = mapper(bits), 96
    x, gamma = leaf(50, width), leaf(width)
    y = layer_norm(m, x, (width,), gamma, None, 1e-5)
    y64 = functional.layer_norm(x.detach().double(), (width,), gamma.detach().double())
    n = functional.layer_norm(x.detach().double(), (width,))
    steps = [m.map(t.detach(), kind).step for t, kind in ((x, "activation"), (gamma, "weight"))]
    sigma = x.detach().double().std(-1, unbiased=False, keepdim=True)
    error = (y - y64).abs()
    assert (error <= 1.2 * (gamma.abs() * (1 + n.abs()) * steps[0] / sigma + n.abs() * steps[1])).all()
    assert error.max() > 0


def test_eps_is_honoured() -> None:
    """At a variance of 1e-12 the result hangs on eps alone; every eps gives float's."""
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]]) * 1e-6
    for eps in (1e-12, 1e-10, 1e-5, 1.0):
        found = layer_norm(mapper((16, 16, 16)), x, (4,), None, None, eps)
        expected = functional.layer_norm(x.double(), (4,), eps=eps)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exponents", ["row", "tensor"])
@pytest.mark.parametrize("eps", EPS)
def test_equal_values_and_zeros_give_beta(eps: float, exponents: str) -> None:
    beta = leaf(8)
    for row in (torch.zeros(2, 8), torch.full((2, 8), 0.7), torch.full((2, 8), 2.0**-149)):
        x = row.clone().requires_grad_()
        y = layer_norm(mapper(key=None, exponents=exponents), x, (8,), leaf(8), beta, eps)
        assert torch.equal(y, beta.expand(2, 8))
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_several_axes_and_no_weights() -> None:
    m, x = mapper((16, 16, 16)), leaf(3, 4, 5)
    y = layer_norm(m, x, (4, 5))
    y.backward(torch.randn(3, 4, 5))
    torch.testing.assert_close(y, functional.layer_norm(x, (4, 5)), rtol=0, atol=1e-3)
    gamma, beta = leaf(4, 5), leaf(4, 5)
    layer_norm(m, x, (4, 5), gamma, beta).sum().backward()
    assert gamma.grad.shape == beta.grad.shape == (4, 5)


@pytest.mark.parametrize("exponents", ["row", "tensor"])
def test_nothing(exponents: str) -> None:
    x, gamma, beta = torch.zeros(0, 8, requires_grad=True), leaf(8), leaf(8)
    layer_norm(mapper(exponents=exponents), x, (8,), gamma, beta).sum().backward()
    assert not gamma.grad.any()
    assert not beta.grad.any()


@pytest.mark.parametrize("width", [65536, 40000])
def test_the_widest_rows_of_the_largest_integers_are_exact(width: int) -> None:
    """Sums near 2**62: half of the row at one end, half at the other."""
    x = torch.ones(1, width) - 2.0**-15
    x[0, ::2] *= -1
    y = layer_norm(mapper((16, 16, 16), None), x, (width,), None, None, 0.0)
    torch.testing.assert_close(y, x.sign(), rtol=2**-21, atol=0)


def test_rows_that_are_too_wide() -> None:
    with pytest.raises(FixedPointError, match="takes up to 65536"):
        layer_norm(mapper(), torch.zeros(1, 65537), (65537,))


@pytest.mark.parametrize(
    "bits, exponents",
    [
        ((8, 8, 8), "row"),
        ((16, 12, 16), "tensor"),
        pytest.param((16, 12, 16), "row", marks=pytest.mark.slow),
        pytest.param((8, 8, 8), "tensor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fused_kernels_give_the_same_bits(bits: tuple[int, int, int], exponents: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x, gamma, beta = (torch.randn(70, 48) * 3 + 1).requires_grad_(), leaf(48), leaf(48)
        y = layer_norm(mapper(bits, exponents=exponents), x, (48,), gamma, beta, 1e-12)
        y.backward(torch.randn(70, 48))
        return [y.detach(), *(tensor.grad for tensor in (x, gamma, beta) if tensor.grad is not None)]

    expected = run()
    with fused_kernels() as works:
        if not works:
            pytest.skip("torch.compile fails here")
        found = run()
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", [36, 100, 130])
def test_gradients_are_the_same_on_any_number_of_threads(width: int) -> None:
    """Also where columns fill no vector: torch's own sum over rows would depend on it."""
    torch.manual_seed(0)
    x, g, before = torch.randn(1500, width), torch.randn(1500, width), torch.get_num_threads()
    found = []
    try:
        for count in (1, 8, 16):
            torch.set_num_threads(count)
            gamma = torch.ones(width, requires_grad=True)
            layer_norm(mapper(exponents="row"), x, (width,), gamma).backward(g)
            found.append(gamma.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])
