"""Linear layers and products of activations, forward and backward in integers.

With ``X, W, G`` mapped to integers (``quantsim.numerics.fixed_point``; ``G`` is the gradient of ``Y``)::

    Y  = inverse(X_hat @ W_hat.T) + bias          [n, out]
    dX = inverse(G_hat @ W_hat)                   [n, in]
    dW = inverse(G_hat.T @ X_hat)                 [out, in]
    db = inverse(sum over rows of G_hat)          [out]

Products are exact, and the sum over rows; ``inverse`` rounds once to float32, and what follows is added in float32: the bias, and the
gradients of a factor that was broadcast. Backward reads the forward's integers. So an element of ``dX`` differs from that of float, for
these ``X`` and ``W``, by at most (``u = 2**-24``, steps ``s_G`` and ``s_W``, rounding less than a step)::

    |dX - G @ W| <= sum_k (|G_k| s_W + |W_k| s_G + s_G s_W) + u |dX|

and the same holds for ``Y`` (with ``s_X, s_W``) and ``dW`` (with ``s_G, s_X``). Where rounding is stochastic the operands of a product
are rounded independently, so its expectation is that of float (but for values in the topmost step of a tensor, which are clamped).

**Exponents of rows** (``exponents="row"``): each token of ``X`` and each output of ``W`` has its own, ``X = 2**x[n] X_hat`` and
``W = 2**w[o] W_hat``. Forward they scale the accumulators' rows and columns. Backward they would stand inside the sums, so ``G`` takes
them over before it is mapped, once for each product (multiplied by powers of two: exact as long as it stays a normal float32)::

    dX = 2**g[n] (G_hat @ W_hat)              G 2**w[o] = 2**g[n] G_hat,    an exponent for each row
    dW = 2**h[o] (H_hat.T @ X_hat)            G 2**x[n] = 2**h[o] H_hat,    an exponent for each column
    db = 2**b[o] (sum over rows of B_hat)     G         = 2**b[o] B_hat,    an exponent for each column

The bounds hold with the step of each row and column; for an element of ``G`` it is ``2**(g[n] - w[o])`` in ``dX`` and
``2**(h[o] - x[n])`` in ``dW``. So forward an outlier costs precision in its own token or output alone; backward a token's outlier costs
the other tokens' gradients some in ``dW``, as a weight's costs the other outputs' in ``dX``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantsim.kernels.digits import missing_for_digits, sums
from quantsim.kernels.integer_matmul import multiply
from quantsim.numerics.fixed_point import FixedPoint, from_accumulator
from quantsim.rewrites.integer_training.op import Mapper, keep, kept


def linear(mapper: Mapper, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x ``[*, in]``, weight ``[out, in]``, bias ``[out]``."""
    return _Linear.apply(mapper, x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def addmm(mapper: Mapper, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight + bias``: x ``[n, in]``, weight ``[in, out]``."""
    return linear(mapper, x, weight.t(), bias)


def weight_on_the_right(mapper: Mapper, x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: x ``[*, in]``, weight ``[in, out]``."""
    return linear(mapper, x, weight.t())


def matmul(mapper: Mapper, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two activations ``[*, n, k]`` and ``[*, k, m]``; leading axes broadcast."""
    return _Matmul.apply(mapper, a, b)  # type: ignore[no-any-return, no-untyped-call]


def sum_rows(g: FixedPoint) -> Tensor:
    """``[n, m] -> [m]``, exact until it is mapped back; ``g`` has one exponent, or one for each column.

    Raises:
        ValueError: exponents of something else.
    """
    m = g.mantissa
    if isinstance(g.exponent, Tensor) and g.exponent.shape != (1, m.shape[1]):
        raise ValueError(f"exponents: {list(g.exponent.shape)}; expected one of each column, [1, {m.shape[1]}]")
    total = m.sum(0, dtype=torch.int64) if m.device.type != "cpu" or missing_for_digits() else sums(m, 0)
    return from_accumulator(total, g.exponent if isinstance(g.exponent, int) else g.exponent.flatten())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mapper: Mapper, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        q = mapper.map(x.reshape(-1, x.shape[-1]), "activation", axis=0)  # [*, in] -> [n, in]
        w = mapper.map(weight, "weight", axis=0)
        keep(ctx, q, w)
        ctx.mapper, ctx.shape = mapper, x.shape
        y = multiply(q, w.t(), bias)
        return y.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        (x, w), _ = kept(ctx)
        _, needs_x, needs_w, needs_b = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])  # [n, out]
        dx = dw = db = None
        if isinstance(w.exponent, int):  # one a tensor: one mapping serves all three
            g = ctx.mapper.map(grad, "gradient")
            dx = multiply(g, w).reshape(ctx.shape) if needs_x else None
            dw = multiply(g.t(), x) if needs_w else None
            db = sum_rows(g) if needs_b else None
            return None, dx, dw, db
        if needs_x:
            dx = multiply(ctx.mapper.map(grad, "gradient", axis=0, times=w.t().exponent), w.without_exponent()).reshape(ctx.shape)
        if needs_w:
            dw = multiply(ctx.mapper.map(grad, "gradient", 1, axis=1, times=x.exponent).t(), x.without_exponent())
        if needs_b:
            db = sum_rows(ctx.mapper.map(grad, "gradient", 2, axis=1))
        return None, dx, dw, db


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mapper: Mapper, a: Tensor, b: Tensor) -> Tensor:
        qa, qb = mapper.map(a, "activation"), mapper.map(b, "activation", slot=1)
        keep(ctx, qa, qb)
        ctx.mapper = mapper
        return multiply(qa, qb).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (a, b), _ = kept(ctx)
        g = ctx.mapper.map(grad, "gradient")  # [*, n, m]
        _, needs_a, needs_b = ctx.needs_input_grad
        grad_a = multiply(g, b.t()).sum_to_size(a.mantissa.shape) if needs_a else None
        grad_b = multiply(a.t(), g).sum_to_size(b.mantissa.shape) if needs_b else None
        return None, grad_a, grad_b
