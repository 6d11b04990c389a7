"""Products of integers that stay integers: int8 (or uint8) times int8, summed in int32, exact.

``torch._int_mm`` is the kernel (oneDNN). It takes matrices; a batch of them is a kernel of ours (``batched``), or one call each, inside
one operator, so that a compiler sees no loop. Where oneDNN's kernel is missing or saturates, float32 products take its place, of so few
terms that each sum is an exact integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantsim.kernels.batched import batched_matmul, missing_for_batches

LARGEST_SUM, LARGEST_AFFINE_SUM = (2**31 - 1) // (255 * 128), (2**31 - 1) // (255 * 255)
"""So many products of a uint8 and an int8 fit into an int32, whatever they are: 65,793, or 33,025 of two differences
of uint8 numbers."""


def int8_matmul(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    """``a @ b``: ``[..., m, k]`` of int8 or uint8 and ``[..., k, n]`` of int8 (or ``[k, n]``) → int32 ``[..., m, n]``.

    Bits: ``k * 255 * 128 < 2**31`` for ``k`` up to ``LARGEST_SUM``; above, it is refused.

    Args:
        kernel: run on oneDNN's kernel; else in float32, part by part and exact, for machines where that kernel is not.

    >>> int8_matmul(torch.full((1, 3), -128, dtype=torch.int8), torch.full((3, 1), -128, dtype=torch.int8), kernel=False)
    tensor([[49152]], dtype=torch.int32)
    """
    product: Tensor = _int8_matmul(a, b, kernel)
    return product


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``: ``[m, k]`` of int8 or uint8 times int8 ``[k, n]``, in int32.

    A ``b`` of one row is given a row's stride: with strides ``(1, 1)``, as the transpose of a column has them, torch 2.13 returns
    memory that nobody wrote to.
    """
    return torch._int_mm(a, b.as_strided(b.shape, (b.shape[1], 1)) if len(b) == 1 and b.stride(1) == 1 else b)


def affine_matmul(a: Tensor, b: Tensor, zero_a: int, zero_b: int, kernel: bool) -> Tensor:
    """``(a - zero_a) @ (b - zero_b)`` in int32, exact, for int8 or uint8 on either side.

    ``a @ b - zero_a * sum_k b - zero_b * sum_k (a - zero_a)``: 8-bit products, and a sum for each side whose zero point is not 0. A uint8
    on the right is moved to int8 by 128.

    Bits: the result is a sum of ``k`` products of at most ``255 * 255``, so ``k`` up to 33,025 (steps between may wrap around 32 bits,
    and wrap back).

    >>> affine_matmul(torch.tensor([[255, 3]], dtype=torch.uint8), torch.tensor([[200], [7]], dtype=torch.uint8), 5, 100, kernel=False)
    tensor([[25186]], dtype=torch.int32)
    """
    if b.dtype == torch.uint8:
        b, zero_b = (b.to(torch.int16) - 128).to(torch.int8), zero_b - 128
    product = int8_matmul(a, b, kernel)
    if zero_a:
        product = product - zero_a * b.sum(-2, keepdim=True, dtype=torch.int32)
    if zero_b:
        product = product - zero_b * (a.to(torch.int32) - zero_a).sum(-1, keepdim=True, dtype=torch.int32)
    return product


INT8_TERMS, EXACT_TERMS = 2**24 // (255 * 128), 2**24 // (255 * 255)
"""So many of them a float32 adds up exactly, in any order: 514 products with an int8, or 258 of two differences of uint8 numbers."""


def scaled_matmul(a: Tensor, b: Tensor, zero_a: int, zero_b: int, scale: float) -> Tensor:
    """``((a - zero_a) @ (b - zero_b)) * scale`` in float32, for int8 or uint8 on either side; the sum is exact."""
    return exact_matmul(a.float().sub_(zero_a), b.float().sub_(zero_b)).mul_(scale)


def exact_matmul(a: Tensor, b: Tensor, terms: int = EXACT_TERMS) -> Tensor:
    """``a @ b`` of integers in float32, none above 255 in size: the exact sum, rounded once.

    Args:
        terms: so many products add up to less than ``2**24``, below which a float32 holds every integer: 258, or 514 where ``b`` is of
            int8. Their sums are exact in any order; of more, such parts are added in float64.
    """
    return _in_parts(a, b, terms).float()


def _in_parts(a: Tensor, b: Tensor, terms: int) -> Tensor:
    """Exact: float32 of one part, else float64."""
    if a.shape[-1] <= terms:
        return a @ b
    first, *rest = zip(torch.split(a, terms, -1), torch.split(b, terms, -2), strict=True)
    total = (first[0] @ first[1]).double()
    for x, y in rest:
        total += x @ y
    return total


@torch.library.custom_op("quantsim::int8_matmul", mutates_args=())
def _int8_matmul(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    if a.shape[-1] > LARGEST_SUM:
        raise ValueError(f"a product over {a.shape[-1]} integers of 8 bits may overflow 32 bits; at most {LARGEST_SUM}")
    if a.dtype not in (torch.int8, torch.uint8) or b.dtype != torch.int8:
        raise ValueError(f"a product of {a.dtype} and {b.dtype}; expected int8 or uint8, and int8")
    if not kernel:
        return _in_parts(a.float(), b.float(), INT8_TERMS).to(torch.int32)
    if b.ndim == 2:
        rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
        return int_mm(rows, b).reshape(*a.shape[:-1], b.shape[-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (a, b))
    if not missing_for_batches():
        return batched_matmul(left, right).reshape(*batch, a.shape[-2], b.shape[-1])
    out = torch.empty(len(left), a.shape[-2], b.shape[-1], dtype=torch.int32, device=a.device)
    for x, y, z in zip(left, right, out, strict=True):
        torch._int_mm(x, y, out=z)
    return out.reshape(*batch, *out.shape[-2:])


@_int8_matmul.register_fake
def _(a: Tensor, b: Tensor, kernel: bool) -> Tensor:
    batch = a.shape[:-2] if b.ndim == 2 else torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return torch.empty(*batch, a.shape[-2], b.shape[-1], dtype=torch.int32, device=a.device)
