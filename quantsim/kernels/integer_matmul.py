"""Exact products of integer matrices of 4 to 16 bits, on the fastest kernels that are exact.

**Up to 8 bits**: ``int8 × int8`` accumulated in 32 bits (``torch._int_mm``: oneDNN). A sum over ``K`` terms is at most
``2**14 * K``, below ``2**31`` for ``K < 131072``.

**9 to 16 bits**: a mantissa ``m`` is cut into int8 digits, ``m = 256 * high + low + offset``, and digits are multiplied as above.

- Up to 15 bits: ``high = (m + 128) >> 8``, ``low = m - 256 * high``, ``offset = 0``; ``|high| <= 64``, ``-128 <= low <= 127``.
- 16 bits: digits that are rounded reach ``high = 128``, which is no int8; so ``high = m >> 8`` in ``[-128, 127]``,
  ``low = (m & 255) - 128`` in ``[-128, 127]`` and ``offset = 128``. With ``a = a' + offset_a`` and ``b = b' + offset_b``::

      sum a * b = sum a' * b' + offset_b * sum a' + offset_a * sum b' + K * offset_a * offset_b

Each product of digits is an exact int32. They are put together as ``sum 256**(i+j) * P_ij``: in int32 where the sum of all magnitudes,
at most ``K * (2**(a-1) + 256) * (2**(b-1) + 256)``, is below ``2**31`` (10 bits up to ``K = 3640``), else in float64, which is
exact as long as it is below ``2**53``: at 16 × 16 bits ``K * 2**30.03``, so for every ``K <= 2**22``. That is where products stop. Where
there is a C++ compiler, cutting is one pass over an operand, and putting together one over the products, in int64 (``kernels.digits``).

**Where the CPU has AMX**, one kernel does all of it that :func:`multiply` is asked for (``kernels.amx``): its tiles multiply signed and
unsigned digits alike, so there are no offsets, and what leaves it is float32.

**Where there is no such kernel** (batches of matrices, other devices, CPUs whose int8 kernels saturate, ``K >= 131072``) the product is
one of float32 where every partial sum is below ``2**24`` and its products use all bits, else of float64: integers below these bounds are
exact in them, in any order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantsim.kernels import amx
from quantsim.kernels.digits import cut, missing_for_digits, sums, together
from quantsim.kernels.int8_matmul import int_mm
from quantsim.numerics.fixed_point import FixedPoint, FixedPointError, factors_of, from_accumulator, limit_of

LARGEST_K = 2**22
INT8_KERNEL_K = 2**17


def multiply(a: FixedPoint, b: FixedPoint, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` in float32: mantissas multiplied exactly, exponents added, the accumulators mapped back.

    Args:
        a: ``[*, n, k]``; exponents, where there are several, are of its rows.
        b: ``[*, k, m]``; of its columns.
        bias: ``[m]``.
    """
    bias = None if bias is None else bias.detach().float()
    if _on_tiles(a.mantissa, b.mantissa):
        return amx.product(a.mantissa, b.mantissa, a.exponent, b.exponent, bias)
    exponent = a.exponent + b.exponent
    if max(a.bits, b.bits) <= 8 or not _on_int8_kernel(a.mantissa, b.mantissa) or missing_for_digits():
        return from_accumulator(integer_matmul(a.mantissa, b.mantissa, a.bits, b.bits), exponent, bias)
    if isinstance(exponent, int):
        return _by_digits_in_one_pass(a, b, factors_of(exponent), bias)
    return from_accumulator(_by_digits_in_one_pass(a, b, (1.0, 1.0), None), exponent, bias)  # rounded to float32 there already


def integer_matmul(a: Tensor, b: Tensor, a_bits: int, b_bits: int) -> Tensor:
    """``a @ b``, exact: int32, float32 or float64 that holds integers.

    Args:
        a: ``[*, n, k]``, int8 or int16, ``|a| < 2**(a_bits-1)``; any strides.
        b: ``[*, k, m]``, the same.
        a_bits, b_bits: 4 to 16.

    Raises:
        FixedPointError: more than ``2**22`` terms a sum.

    >>> int(integer_matmul(torch.tensor([[32767, -32767]], dtype=torch.int16), torch.tensor([[127], [-127]], dtype=torch.int8), 16, 8))
    8322818
    """
    k = a.shape[-1]
    if k > LARGEST_K:
        raise FixedPointError(f"a product over {k} terms; expected {LARGEST_K} or fewer (cut the batch)")
    largest = k * limit_of(a_bits) * limit_of(b_bits)
    if not _on_int8_kernel(a, b):
        dtype = torch.float32 if largest < 2**24 and _float32_is_whole(a.device) else torch.float64
        return a.to(dtype) @ b.to(dtype)
    if a_bits <= 8 and b_bits <= 8:
        return int_mm(a, b)
    return _by_digits(a, b, a_bits, b_bits)


def _on_tiles(a: Tensor, b: Tensor) -> bool:
    """A product of two matrices that AMX takes, on a machine that has it."""
    return a.ndim == b.ndim == 2 and a.shape[-1] <= amx.LARGEST_K and a.device.type == "cpu" and not amx.missing_for_tiles()


def _on_int8_kernel(a: Tensor, b: Tensor) -> bool:
    """A product of two matrices whose sums fit the int8 kernel, on a machine that has it."""
    return a.ndim == b.ndim == 2 and a.shape[-1] < INT8_KERNEL_K and a.device.type == "cpu" and int8_kernel_is_exact()


def _float32_is_whole(device: torch.device) -> bool:
    """Products of float32 use all of its bits: a GPU's may be TF32, and those of a CPU bf16 (``torch.set_float32_matmul_precision``)."""
    return device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


@cache
def int8_kernel_is_exact() -> bool:
    """``torch._int_mm`` gives the largest sums here. Tried, not looked up: x86 kernels without VNNI saturate in 16 bits in silence."""
    low, high = (torch.full((64, 64), value, dtype=torch.int8) for value in (-128, 127))
    try:
        sums = [float(torch._int_mm(x, y)[0, 0]) for x, y in ((low, low), (low, high), (high, high))]
    except RuntimeError:  # a build without the kernel
        return False
    return sums == [64.0 * 128 * 128, -64.0 * 128 * 127, 64.0 * 127 * 127]


def _by_digits(a: Tensor, b: Tensor, a_bits: int, b_bits: int) -> Tensor:
    """Digits multiplied pair by pair and put together; see the module's docstring."""
    (a_digits, a_offset), (b_digits, b_offset) = digits(a, a_bits), digits(b, b_bits)
    k = a.shape[-1]
    fits = k * (2 ** (a_bits - 1) + 256) * (2 ** (b_bits - 1) + 256) < 2**31
    dtype = torch.int32 if fits else torch.float64
    total = torch.zeros(a.shape[0], b.shape[1], dtype=dtype)
    for i, a_digit in enumerate(a_digits):
        for j, b_digit in enumerate(b_digits):
            total.add_(int_mm(a_digit, b_digit), alpha=256 ** (i + j))
    if b_offset:  # sum a' = sum a - k * offset_a
        total += b_offset * (a.sum(1, keepdim=True, dtype=torch.int64) - k * a_offset).to(dtype)
    if a_offset:
        total += a_offset * (b.sum(0, keepdim=True, dtype=torch.int64) - k * b_offset).to(dtype)
    return total + k * a_offset * b_offset if a_offset and b_offset else total


def _by_digits_in_one_pass(a: FixedPoint, b: FixedPoint, factors: tuple[float, float], bias: Tensor | None) -> Tensor:
    """:func:`_by_digits`, mapped back: one pass cuts an operand, one puts the products together, in 64 bits."""
    k = a.mantissa.shape[1]
    (a_digits, a_offset), (b_digits, b_offset) = _cut(a), _cut(b)
    products = [(int_mm(x, y), 8 * (i + j)) for i, x in enumerate(a_digits) for j, y in enumerate(b_digits)]
    rows = sums(a.mantissa, 1, b_offset, -k * a_offset * b_offset) if b_offset else None  # sum a' = sum a - k * offset_a
    columns = sums(b.mantissa, 0, a_offset, 0) if a_offset else None  # sum b' + k * offset_b = sum b
    return together(products, rows, columns, factors, bias)


def _cut(x: FixedPoint) -> tuple[tuple[Tensor, ...], int]:
    """:func:`digits`, in one pass."""
    return ((x.mantissa,), 0) if x.bits <= 8 else (cut(x.mantissa, x.bits == 16), 128 if x.bits == 16 else 0)


def digits(m: Tensor, bits: int) -> tuple[tuple[Tensor, ...], int]:
    """The int8 digits of mantissas, the lowest first, and the offset: ``m = sum 256**i * digit_i + offset``.

    >>> digits(torch.tensor([-300, 127, 128], dtype=torch.int16), 10)
    ((tensor([ -44,  127, -128], dtype=torch.int8), tensor([-1,  0,  1], dtype=torch.int8)), 0)
    """
    if bits <= 8:
        return (m,), 0
    if bits == 16:
        return (((m & 255) - 128).to(torch.int8), (m >> 8).to(torch.int8)), 128
    high = (m + 128) >> 8
    return ((m - (high << 8)).to(torch.int8), high.to(torch.int8)), 0
