"""Products of integers that stay integers: int8 (or uint8) times int8, summed in int32, exact.

``torch._int_mm`` is the kernel (oneDNN). It takes matrices; a batch of them is one call each, inside one operator, so that a compiler sees
no loop. Where the kernel is missing or saturates, the same product is computed in 64-bit integers, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SUM = (2**31 - 1) // (255 * 128)
"""So many products of a uint8 and an int8 fit into an int32, whatever they are: 65,793."""


def int8_matmul(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    """``a @ b``: ``[..., m, k]`` of int8 or uint8 and ``[..., k, n]`` of int8 (or ``[k, n]``) → int32 ``[..., m, n]``.

    Bits: ``k * 255 * 128 < 2**31`` for ``k`` up to ``LARGEST_SUM``; above, it is refused.

    Args:
        kernel: run on oneDNN's kernel; else in plain 64-bit integers, for machines where that is not exact.

    >>> int8_matmul(torch.full((1, 3), -128, dtype=torch.int8), torch.full((3, 1), -128, dtype=torch.int8), kernel=False)
    tensor([[49152]], dtype=torch.int32)
    """
    product: Tensor = _int8_matmul(a, b, kernel)
    return product


@torch.library.custom_op("quantsim::int8_matmul", mutates_args=())
def _int8_matmul(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    if a.shape[-1] > LARGEST_SUM:
        raise ValueError(f"a product over {a.shape[-1]} integers of 8 bits may overflow 32 bits; at most {LARGEST_SUM}")
    if not kernel:
        return (a.to(torch.int64) @ b.to(torch.int64)).to(torch.int32)
    if b.ndim == 2:
        rows = a.reshape(-1, a.shape[-1])
        return torch._int_mm(rows, b).reshape(*a.shape[:-1], b.shape[-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    out = torch.empty(len(left), a.shape[-2], b.shape[-1], dtype=torch.int32, device=a.device)
    for x, y, z in zip(left, right, out, strict=True):
        torch._int_mm(x, y, out=z)
    return out.reshape(*batch, *out.shape[-2:])


@_int8_matmul.register_fake
def _(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    batch = a.shape[:-2] if b.ndim == 2 else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return torch.empty(*batch, a.shape[-2], b.shape[-1], dtype=torch.int32, device=a.device)
