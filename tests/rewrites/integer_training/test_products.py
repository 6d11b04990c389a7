"""Linear layers and products: equal to exact arithmetic on the mapped operands, and near float by the stated bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantsim.numerics.fixed_point import FixedPointError
from quantsim.rewrites.integer_training.products import addmm, linear, matmul, weight_on_the_right
from tests.rewrites.integer_training.mapped import BITS, U, leaf, mapper, step, value


@pytest.mark.parametrize("key", [11, None], ids=["stochastic", "eval"])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_linear_is_exact_on_its_integers(bits: tuple[int, int, int], key: int | None) -> None:
    m = mapper(bits, key)
    x, w, b = leaf(3, 7, 40), leaf(20, 40, scale=0.05), leaf(20)
    g = torch.randn(3, 7, 20) * 1e-3
    y = linear(m, x, w, b)
    y.backward(g)
    rows, weight, gradient = value(m, x.reshape(21, 40), "activation"), value(m, w, "weight"), value(m, g.reshape(21, 20), "gradient")
    assert torch.equal(y.reshape(21, 20), (rows @ weight.t()).float() + b)
    assert torch.equal(x.grad.reshape(21, 40), (gradient @ weight).float())
    assert torch.equal(w.grad, (gradient.t() @ rows).float())
    assert torch.equal(b.grad, gradient.sum(0).float())


@pytest.mark.parametrize("key", [11, None], ids=["stochastic", "eval"])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_linear_with_exponents_of_rows_is_exact_on_its_integers(bits: tuple[int, int, int], key: int | None) -> None:
    """Rows whose sizes differ by 2**20: every product of integers is exact, and scaled by powers of two alone."""
    m = mapper(bits, key, exponents="row")
    x, w, b = leaf(21, 40), leaf(20, 40, scale=0.05), leaf(20)
    g = torch.randn(21, 20) * 1e-3
    with torch.no_grad():
        x *= torch.exp2(torch.randint(-10, 11, (21, 1)).float())
        w *= torch.exp2(torch.randint(-10, 11, (20, 1)).float())
    y = linear(m, x, w, b)
    y.backward(g)
    rows, weight = m.map(x.detach(), "activation", axis=0), m.map(w.detach(), "weight", axis=0)
    for_x = m.map(g, "gradient", axis=0, times=weight.t().exponent)
    for_w = m.map(g, "gradient", slot=1, axis=1, times=rows.exponent)
    assert len(rows.exponent.unique()) > 10
    products = [
        (y, rows.mantissa, weight.mantissa.t(), rows.step * weight.t().step),
        (x.grad, for_x.mantissa, weight.mantissa, for_x.step),
        (w.grad, for_w.mantissa.t(), rows.mantissa, for_w.t().step),
    ]
    for found, left, right, scale in products:
        expected = (left.double() @ right.double()).float() * scale
        assert torch.equal(found, expected + b if found is y else expected)
    assert torch.equal(b.grad, value(m, g, "gradient", slot=2, axis=1).sum(0).float())


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_gradients_with_exponents_of_rows_are_within_the_bound_of_float(bits: tuple[int, int, int]) -> None:
    m = mapper(bits, exponents="row")
    x, w, g = leaf(30, 64), leaf(20, 64, scale=0.05), torch.randn(30, 20) * 1e-4
    with torch.no_grad():
        x[3] *= 1000
        w[5] *= 1000
    y = linear(m, x, w)
    y.backward(g)
    x64, w64, g64 = x.detach().double(), w.detach().double(), g.double()
    of_x, of_w = m.map(x.detach(), "activation", axis=0), m.map(w.detach(), "weight", axis=0)
    in_rows = step(m, g, "gradient", axis=0, times=of_w.t().exponent)
    in_columns = step(m, g, "gradient", slot=1, axis=1, times=of_x.exponent)
    one = torch.ones(())
    for found, a, b, a_step, b_step in (
        (y, x64, w64.t(), of_x.step, of_w.t().step),
        (x.grad, g64 * of_w.t().step, w64 / of_w.step, in_rows, one),
        (w.grad, (g64 * of_x.step).t(), x64 / of_x.step, in_columns.t(), one),
    ):
        assert ((found.double() - a @ b).abs() <= bound(a, b, a_step, b_step, a @ b)).all()


@pytest.mark.parametrize("exponents", ["row", "tensor"])
def test_a_bias_gradient_is_near_the_sum_whatever_the_weights_are(exponents: str) -> None:
    """Less than a step a row: of its column, or of the tensor. An output of zeros, and one 4,096 times as large as the others."""
    m = mapper(exponents=exponents)
    x, w, b, g = leaf(64, 32), leaf(6, 32, scale=0.05), leaf(6), torch.randn(64, 6) * 1e-3
    with torch.no_grad():
        w[2] = 0
        w[4] *= 4096
    linear(m, x, w, b).backward(g)
    steps = step(m, g, "gradient", slot=2, axis=1)
    assert ((b.grad.double() - g.double().sum(0)).abs() <= 64 * torch.as_tensor(steps)).all()
    assert torch.nn.functional.cosine_similarity(b.grad, g.sum(0), dim=0) > 0.99


def test_forward_an_outlier_costs_precision_in_its_own_row_alone() -> None:
    x, w = leaf(8, 32), leaf(6, 32)
    with torch.no_grad():
        x[2] *= 1e6
        w[4] *= 1e6
    exact = x.detach().double() @ w.detach().double().t()
    others = [i for i in range(8) if i != 2], [i for i in range(6) if i != 4]
    inside, errors = exact[others[0]][:, others[1]], {}
    for exponents in ("row", "tensor"):
        found = linear(mapper(key=None, exponents=exponents), x, w)[others[0]][:, others[1]]
        errors[exponents] = (found.double() - inside).abs().max() / inside.abs().mean()
    assert errors["row"] < 0.1
    assert errors["tensor"] > 0.9
    by_itself = linear(mapper(key=None, exponents="row"), x[3:4], w)
    assert torch.equal(by_itself, linear(mapper(key=None, exponents="row"), x, w)[3:4])  # a row does not hang on its batch


def bound(a: Tensor, b: Tensor, a_step: float | Tensor, b_step: float | Tensor, result: Tensor) -> Tensor:
    """Of ``a @ b``, as the module's docstring has it; steps may be of the rows of ``a`` and of the columns of ``b``."""
    ones_a, ones_b = torch.ones_like(a), torch.ones_like(b)
    return a.abs() @ ones_b * b_step + ones_a @ b.abs() * a_step + a.shape[1] * a_step * b_step + 2 * U * result.abs()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_gradients_are_within_the_bound_of_float(bits: tuple[int, int, int], rounding: str) -> None:
    m = mapper(bits, weight_rounding=rounding, activation_rounding=rounding, gradient_rounding=rounding)
    x, w = leaf(30, 64), leaf(20, 64, scale=0.05)
    g = torch.randn(30, 20) * 1e-4
    y = linear(m, x, w)
    y.backward(g)
    steps = step(m, x, "activation"), step(m, w, "weight"), step(m, g, "gradient")
    x64, w64, g64 = x.detach().double(), w.detach().double(), g.double()
    for found, a, b, a_step, b_step in (
        (y, x64, w64.t(), steps[0], steps[1]),
        (x.grad, g64, w64, steps[2], steps[1]),
        (w.grad, g64.t(), x64, steps[2], steps[0]),
    ):
        error = (found.double() - a @ b).abs()
        assert (error <= bound(a, b, a_step, b_step, a @ b)).all()
        assert error.max() > 0  # float itself would pass a bound


@pytest.mark.parametrize("exponents", ["row", "tensor"])
def test_gradients_are_unbiased(exponents: str) -> None:
    """The mean over 1,000 keys: each of 232 elements of dX, dW and db within 5.5 standard errors (about 1e-5 by chance)."""

    def below_the_topmost_step(*shape: int) -> Tensor:
        """0.5 to 0.9 times powers of two: what lies in the topmost step is clamped, and so biased."""
        return (torch.rand(*shape) * 0.4 + 0.5) * torch.exp2(torch.randint(-3, 1, shape).float()) * torch.randn(*shape).sign()

    x, w, b, g = (below_the_topmost_step(*shape).requires_grad_() for shape in ((6, 16), (8, 16), (8,), (6, 8)))
    draws = []
    for key in range(1000):
        x.grad = w.grad = b.grad = None
        linear(mapper((5, 5, 5), key, exponents=exponents), x, w, b).backward(g)
        draws.append(torch.cat([p.grad.flatten() for p in (x, w, b)]).double())
    found = torch.stack(draws)
    exact = torch.cat([(g @ w).flatten(), (g.t() @ x).flatten(), g.sum(0)]).detach().double()
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(1000))
    assert z.abs().max() < 5.5


def test_weights_on_the_other_side() -> None:
    m = mapper((12, 12, 12))
    x, w, b = leaf(5, 9), leaf(9, 4), leaf(4)
    expected = linear(m, x, w.t(), b)
    assert torch.equal(addmm(m, b, x, w), expected)
    weight_on_the_right(m, x, w).sum().backward()
    assert w.grad.shape == w.shape


@pytest.mark.parametrize("shapes", [((2, 3, 5, 8), (2, 3, 8, 4)), ((4, 5, 8), (8, 6)), ((1, 3, 5, 8), (2, 1, 8, 4))], ids=str)
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_product_of_activations(bits: tuple[int, int, int], shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    m = mapper(bits)
    a, b = leaf(*shapes[0]), leaf(*shapes[1])
    y = matmul(m, a, b)
    g = torch.randn_like(y)
    y.backward(g)
    a64 = value(m, a, "activation").requires_grad_()
    b64 = m.map(b.detach(), "activation", slot=1).value().double().requires_grad_()
    y64 = a64 @ b64
    y64.backward(value(m, g, "gradient"))
    assert torch.equal(y, y64.float())
    torch.testing.assert_close(a.grad, a64.grad.float(), rtol=1e-6, atol=1e-6)  # sums over broadcast axes round
    torch.testing.assert_close(b.grad, b64.grad.float(), rtol=1e-6, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, w = torch.randn(3, 4), leaf(2, 4)
    linear(mapper(), x, w).sum().backward()
    assert x.grad is None
    assert w.grad is not None


@pytest.mark.parametrize("exponents", ["row", "tensor"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_gradient_that_is_not_finite_is_refused_by_name(value: float, exponents: str) -> None:
    x, w = leaf(3, 4), leaf(2, 4)
    g = torch.ones(3, 2)
    g[1, 1] = value
    y = linear(mapper(exponents=exponents), x, w)
    with pytest.raises(FixedPointError, match=r"layer\.dense, gradient: 1 of 6 values are NaN or infinite"):
        y.backward(g)
    with pytest.raises(FixedPointError, match=r"layer\.dense, activation: 2 of 12"):
        linear(mapper(exponents=exponents), torch.tensor([[1.0, value, value, 0.0]] * 1 + [[0.0] * 4] * 2), w)


@pytest.mark.parametrize("exponents", ["row", "tensor"])
@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16)], ids=str)
def test_zeros_and_nothing(bits: tuple[int, int, int], exponents: str) -> None:
    for rows in (0, 3):
        x, w, b = torch.zeros(rows, 4, requires_grad=True), leaf(2, 4), leaf(2)
        y = linear(mapper(bits, exponents=exponents), x, w, b)
        y.backward(torch.zeros(rows, 2))
        assert torch.equal(y, b.expand(rows, 2))
        assert not x.grad.any()
        assert not w.grad.any()
        assert not b.grad.any()


@pytest.mark.parametrize("exponents", ["row", "tensor"])
def test_tiny_and_huge_gradients_keep_their_scale(exponents: str) -> None:
    """Exponents are added, so 2**-100 and 2**100 times as large a gradient gives 2**-100 and 2**100 times as large gradients."""
    x, w, g = leaf(5, 6), leaf(3, 6), torch.randn(5, 3)
    found = []
    for scale in (1.0, 2.0**-100, 2.0**100):
        x.grad = w.grad = None
        linear(mapper(exponents=exponents), x, w).backward(g * scale)
        found.append((x.grad / scale, w.grad / scale))
    for pair in found[1:]:
        assert torch.equal(pair[0], found[0][0])
        assert torch.equal(pair[1], found[0][1])


def test_half_precision_goes_in_and_out() -> None:
    x, w = leaf(3, 4), leaf(2, 4)
    y = linear(mapper(), x.to(torch.bfloat16), w)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
