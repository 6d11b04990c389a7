"""AdaRound: learn which weights to round up and which down (Nagel et al., 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantsim.numerics.affine import AffineParams

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # of the sigmoid, so that it reaches 0 and 1 (eq. 23)
LEARNING_RATE = 0.01
REGULARIZATION = 0.05
FREE = 0.2  # the part of the steps without regulariser
BETA_FIRST, BETA_LAST = 20.0, 2.0


def learn_rounding(weight: Tensor, params: AffineParams, gram: Tensor, drift: Tensor, steps: int) -> Tensor:
    """A weight whose values are on its grid, each the one below or above what it was, such that the layer's output changes least.

    The output error of each row of ``w_hat = w + d`` on the layer's inputs, exact ones ``x`` and those of the quantized model
    ``x_hat`` (eq. 25, without the activation function)::

        E |w x - w_hat x_hat|^2 = d G d' - 2 d (w D)' + const,   G = E[x_hat' x_hat],  D = E[(x - x_hat)' x_hat]

    is minimised over ``w_hat = s * clamp(floor(w / s) + h(v))`` with Adam, ``h`` the stretched sigmoid (eq. 23), plus the regulariser
    ``sum 1 - |2 h(v) - 1| ** beta`` that drives ``h`` to 0 and 1 (eq. 24), ``beta`` going from 20 to 2. G and D hold all that the inputs
    say, so every step sees all of them. The error is counted in that of rounding to nearest, so one weight of the regulariser
    fits all layers. A row for which rounding to nearest is better keeps it.

    Args:
        weight: ``[out, in]``.
        params: its grid: one range, or one for each row.
        gram, drift: ``G`` and ``D``, ``[in, in]``.
        steps: of the optimizer.

    Returns:
        ``[out, in]``: quantizing it again on the same grid gives the same values to the bit.
    """
    scale, low, high = (params.broadcast(x, 2) for x in (params.scale, *_ends(params)))
    down, target = (weight / scale).floor(), weight @ drift
    nearest = (weight / scale).round().clamp(low, high)

    def error(integers: Tensor) -> Tensor:
        off = integers * scale - weight
        return ((off @ gram) * off - 2 * off * target).sum(1)  # [out, in] -> [out]

    off = nearest * scale - weight
    unit = ((off @ gram) * off).sum(1).clamp(min=torch.finfo(weight.dtype).tiny)
    with torch.enable_grad():
        v = _inverse_sigmoid((weight / scale - down).clamp(1e-3, 1 - 1e-3)).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        for step in range(steps):
            up = _stretched_sigmoid(v)
            off = (down + up).clamp(low, high) * scale - weight
            slope = 2 * (off.detach() @ gram - target) / unit[:, None]  # of the error in `off`; its value is not needed
            loss = (slope * off).sum()
            if (beta := _beta(step / steps)) is not None:
                loss = loss + REGULARIZATION * (1 - (2 * up - 1).abs().pow(beta)).sum()
            (v.grad,) = torch.autograd.grad(loss, v)
            optimizer.step()
    learned = (down + (_stretched_sigmoid(v.detach()) >= 0.5)).clamp(low, high)
    better = error(learned) < error(nearest)
    return torch.where(better[:, None], learned, nearest) * scale


def _ends(params: AffineParams) -> tuple[Tensor, Tensor]:
    return params.quant_min - params.zero_point, params.quant_max - params.zero_point


def _stretched_sigmoid(v: Tensor) -> Tensor:
    return (v.sigmoid() * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def _inverse_sigmoid(up: Tensor) -> Tensor:
    return ((up - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).logit()


def _beta(done: float) -> float | None:
    """The regulariser's exponent after a part of the steps: falling along half a cosine; ``None`` while there is no regulariser."""
    if done < FREE:
        return None
    return BETA_LAST + (BETA_FIRST - BETA_LAST) * (1 + math.cos(math.pi * (done - FREE) / (1 - FREE))) / 2
