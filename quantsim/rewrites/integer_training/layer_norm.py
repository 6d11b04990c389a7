"""LayerNorm, forward and backward in integers.

**Forward.** A row of ``N`` values is mapped to ``x_i = m_i * 2**e``. Mean and variance need no division as long as they are kept
``N`` and ``N²`` times as large::

    S = sum m_i            Q = sum m_i²           exact, int64
    c_i = N m_i - S        = N (m_i - mean)       exact
    V = N Q - S²           = N² var(m)            exact; below 2**62 for N <= 65536 and 16 bits
    r = 1 / sqrt(V + N² eps 2**(-2e))             one number a row, in float64
    y_i = (c_i gamma_i) r + beta_i

``c_i r = (x_i - mean) / sqrt(var + eps)``, for the exponent cancels from everything but ``eps``. ``gamma`` is mapped as a weight,
``beta`` is added in float32 as a bias is.

With ``exponents="row"`` a row of ``x`` and of the gradient has its own ``e``; nothing else changes, for rows never meet before ``dgamma``
and ``dbeta``.

**Backward.** With ``G`` mapped, ``h_i = g_i gamma_i`` and the normalized ``n_i = c_i r``::

    A = sum h_i            P = sum h_i m_i        exact, int64
    B = N P - S A          = sum h_i c_i          float64
    dx_i = rho (h_i - A / N - c_i r² B / N),      rho = 1 / sqrt(var + eps) = N r 2**-e
    dgamma_i = sum over rows of (g_i c_i) r       float32: every row has its own r
    dbeta_i  = sum over rows of g_i               exact; in float64 where rows have exponents

**Error.** Against float64 on the same mapped values (``x_hat, gamma_hat, g_hat``), with ``u = 2**-24``: integers become float32 once,
after every difference that could cancel but those of ``dx``, and four more operations round::

    |y - y64|   <= 6 u |y64 - beta| + u |y64|
    |dx - dx64| <= 8 u rho (|h_i| + mean|h| + |n_i| mean|h n|)

What mapping itself does to ``y`` is in first order ``gamma (1 + |n_i|) step / sqrt(var + eps)`` and ``|n_i| step_gamma``.

Deviation from an all-integer LayerNorm: the root is taken in float64, and the row's ``r`` multiplies in float32: it stands where the
inverse mapping of other ops has a power of two. A row of equal values gives ``y = beta``; with ``eps = 0`` too (float gives NaN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from quantsim.kernels.mapping import sum_scaled_rows
from quantsim.numerics.fixed_point import FixedPoint, FixedPointError, power_of_two
from quantsim.numerics.fused import compiled_kernel, fused_kernels_active
from quantsim.rewrites.integer_training.op import Mapper, keep, kept
from quantsim.rewrites.integer_training.products import sum_rows

WIDEST = 65536
COLUMNS = 64  # of the sums that torch's kernel makes at a time


def layer_norm(
    mapper: Mapper, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalize over the last ``len(shape)`` axes; weight and bias have that shape.

    Raises:
        FixedPointError: more than 65536 values a row.
    """
    if math.prod(shape) > WIDEST:
        raise FixedPointError(f"{mapper.name}: rows of {math.prod(shape)} values; integer LayerNorm takes up to {WIDEST}")
    return _LayerNorm.apply(mapper, x, tuple(shape), weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mapper: Mapper, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        width = math.prod(shape)
        q = mapper.map(x.reshape(-1, width), "activation", axis=0)  # [n, N]
        gamma = _ones(width, x) if weight is None else mapper.map(weight.reshape(-1), "weight")
        n2_eps = width * width * eps * _power(-2 * q.exponent, x.device)
        y, total, r = _kernel(_normalized, q.mantissa)(q.mantissa, gamma.value(), n2_eps, _exact_in(q))
        keep(ctx, q, gamma, also=(total, r))
        ctx.mapper, ctx.shape, ctx.parameter_shape = mapper, x.shape, shape
        out: Tensor = (y if bias is None else y + bias.reshape(-1)).reshape(x.shape).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, Tensor | None, Tensor | None, None]:
        (q, gamma), (total, r) = kept(ctx)
        assert total is not None
        assert r is not None
        g = ctx.mapper.map(grad.reshape(q.mantissa.shape), "gradient", axis=0)
        _, needs_x, _, needs_gamma, needs_beta, _ = ctx.needs_input_grad
        n, number = q.mantissa, _power(g.exponent + gamma.exponent - q.exponent, r.device)
        dx = dgamma = None
        if needs_x:
            dx = _kernel(_input_gradient, n)(g.mantissa, n, gamma.mantissa, total, r, number, _exact_in(q)).reshape(ctx.shape)
        if needs_gamma:
            terms = _kernel(_gamma_terms, n)(g.mantissa, n, total, r, torch.as_tensor(g.step, device=r.device), _exact_in(q))
            dgamma = _sum_of_terms(terms).reshape(ctx.parameter_shape)
        dbeta = _sum_rows(g).reshape(ctx.parameter_shape) if needs_beta else None
        return None, dx, None, dgamma, dbeta, None


# ---- kernels: plain functions of tensors, that run as they are or compiled into one loop, with the same values ----


def _kernel(function: Callable[..., Any], m: Tensor) -> Callable[..., Any]:
    return compiled_kernel(function) if fused_kernels_active() and min(m.shape) > 1 else function


def _exact_in(q: FixedPoint) -> torch.dtype:
    """The integers that hold ``N m - S``."""
    return torch.int32 if q.mantissa.shape[-1] * 2**q.bits < 2**31 else torch.int64


def _normalized(m: Tensor, gamma: Tensor, n2_eps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``c gamma r`` ``[n, N]``, ``S`` (int64) and ``r`` (float64) of each row, ``[n, 1]``."""
    width = m.shape[-1]
    wide = m.to(torch.int32)
    total = wide.sum(-1, keepdim=True, dtype=torch.int64)
    squares = (wide * wide).sum(-1, keepdim=True, dtype=torch.int64)
    variance = (width * squares - total * total).double() + n2_eps
    r = torch.where(variance > 0, variance.rsqrt(), 0.0)
    return _centred(m, total, dtype) * gamma * r.float(), total, r


def _centred(m: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """``c = N m - S`` as float32, ``[n, N]``: subtracted as integers, then rounded to 24 bits."""
    return (m.to(dtype) * m.shape[-1] - total.to(dtype)).float()


def _input_gradient(g: Tensor, m: Tensor, gamma: Tensor, total: Tensor, r: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    width = m.shape[-1]
    h = g.to(torch.int32) * gamma.to(torch.int32)  # below 2**30
    a = h.sum(-1, keepdim=True, dtype=torch.int64)
    p = (h.long() * m).sum(-1, keepdim=True)  # below 2**45 N
    b = width * p.double() - total.double() * a.double()
    rho = (width * scale * r).float()
    return rho * (h.float() - (a.double() / width).float() - _centred(m, total, dtype) * (r.square() * b / width).float())


def _gamma_terms(g: Tensor, m: Tensor, total: Tensor, r: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    return g.float() * step * _centred(m, total, dtype) * r.float()


def _sum_of_terms(terms: Tensor) -> Tensor:
    """``[n, N] -> [N]``, in an order that does not hang on the number of threads: not fused, and of whole vectors (torch's threads
    share out the columns, and the last of them, which fill no vector, are summed in another order)."""
    width = terms.shape[1]
    return functional.pad(terms, (0, -width % COLUMNS)).sum(0)[:width]


def _sum_rows(g: FixedPoint) -> Tensor:
    return sum_rows(g) if isinstance(g.exponent, int) else sum_scaled_rows(g).float()


def _power(exponent: int | Tensor, device: torch.device) -> Tensor:
    """``2**exponent`` in float64: one number, or ``[n, 1]``."""
    return power_of_two(torch.as_tensor(exponent, dtype=torch.int32, device=device), torch.float64)


def _ones(width: int, like: Tensor) -> FixedPoint:
    return FixedPoint(torch.ones(width, dtype=torch.int8, device=like.device), 0, 8)
