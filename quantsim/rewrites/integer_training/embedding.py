"""Embedding, forward and backward in integers.

Each row of the table has an exponent, or the table has one (``exponents``); the rows that are looked up are mapped, each look-up with
random numbers of its own. The gradient has one exponent, so that its sums are exact::

    Y  = inverse(W_hat[ids])                                    [*, width]
    dW[id] = inverse(sum over the places of id of G_hat)        exact in int64

``|Y - W[ids]| < step``, and ``|dW[id] - float's| < step of G × the number of places``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantsim.kernels.mapping import shared_exponent
from quantsim.numerics.fixed_point import from_accumulator
from quantsim.rewrites.integer_training.op import Mapper


def embedding(mapper: Mapper, weight: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
    """``weight[ids]``: weight ``[rows, width]``, ids of any shape; the row ``padding_idx`` has no gradient."""
    return _Embedding.apply(mapper, weight, ids, padding_idx)  # type: ignore[no-any-return, no-untyped-call]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mapper: Mapper, weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
        found = weight.detach().index_select(0, ids.reshape(-1))  # which refuses negative ids, as torch's embedding does
        if mapper.config.exponents == "row":
            rows = mapper.map(found, "weight", axis=0)
        else:
            exponent = shared_exponent(weight, mapper.config.weight_bits, f"{mapper.name}, weight")
            rows = mapper.map(found, "weight", exponent=exponent)
        ctx.save_for_backward(ids)
        ctx.mapper, ctx.shape, ctx.padding_idx = mapper, weight.shape, padding_idx
        return rows.value().reshape(*ids.shape, weight.shape[1]).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        width = ctx.shape[1]
        g = ctx.mapper.map(grad, "gradient")
        seen, places = ids.reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(len(seen), width, dtype=torch.int64, device=grad.device)
        sums.index_add_(0, places, g.mantissa.reshape(-1, width).long())
        found = from_accumulator(sums, g.exponent)
        found[seen == ctx.padding_idx] = 0
        return None, torch.zeros(ctx.shape, device=grad.device).index_copy_(0, seen, found), None, None
