"""I-BERT's nonlinear functions on integers: second-order polynomials, shifts, and an exact square root.

Source: Kim, Gholami, Yao, Mahoney, Keutzer, *I-BERT: Integer-only BERT Quantization*, 2021, arXiv 2101.01321. The equations are the
paper's. What differs is the scale that they are computed at: every function takes integers at one fixed scale, named beside it, at
which its constants are powers of two. An edge is brought there by one dyadic rescale, so no function depends on how coarse the edge's
own scale is (the paper's GELU at a scale of 8/127 is wrong by 67), and its bit budget holds for every model.

All tensors are int32 unless a docstring says int64, and why.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantsim.numerics.dyadic import rescale

# ---- erf and GELU ----

ERF_A, ERF_B = -0.2888, -1.769
"""The paper's table of coefficients, eq. 6."""
GELU_BITS, ERF_BITS = 14, 15
GELU_SCALE = -ERF_B * math.sqrt(2) / 2**GELU_BITS
"""The scale of what :func:`i_gelu` takes and gives: 2**14 is where the polynomial for erf(x / sqrt(2)) reaches 1, x = 2.5017."""
ERFC_AT_0 = round(-ERF_A * ERF_B**2 * 2**ERF_BITS)


def i_erfc(q: Tensor) -> Tensor:
    """``1 - erf(x / sqrt(2))`` for ``x = q * GELU_SCALE >= 0``, at scale ``2**-15``, from 0 to 29615.

    Eq. 6: ``erf(t) ≈ a (min(t, -b) + b)**2 + 1``. With ``u = 2**14 - min(q, 2**14)`` that is ``erfc = -a b**2 (u / 2**14)**2``.

    Bits: ``u <= 2**14``, its square ``2**28``, after a shift of 13 ``2**15``, times ``ERFC_AT_0 < 2**15`` below ``2**30``.
    """
    u = 2**GELU_BITS - q.clamp(max=2**GELU_BITS)
    out: Tensor = ((u * u >> (2 * GELU_BITS - ERF_BITS)) * ERFC_AT_0) >> ERF_BITS
    return out


def i_erf(q: Tensor) -> Tensor:
    """``erf(x / sqrt(2))`` for ``x = q * GELU_SCALE``, at scale ``2**-15``; eq. 6 with the sign of ``q``, and 0 at 0.

    Bits: ``|q| < 2**31``; see :func:`i_erfc`. Error: below 0.1, the paper's polynomial (it is 0.096 at 0, where x is small in GELU).
    """
    out: Tensor = q.sign() * (2**ERF_BITS - i_erfc(q.abs()))
    return out


def i_gelu(q: Tensor) -> Tensor:
    """``x * (1 + erf(x / sqrt(2))) / 2`` for ``x = q * GELU_SCALE``, at the same scale.

    Eq. 8, written as ``max(x, 0) - |x| * erfc(|x|) / 2``: the second term is 0 from ``|q| = 2**14`` on, so large inputs are never
    multiplied.

    Bits: ``|q| < 2**31``; ``min(|q|, 2**14) * erfc < 2**14 * 2**15 = 2**29``. The result is never larger than ``|q|``.
    Error: 0.0182 (the paper's polynomial), over all inputs.

    >>> x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 50.0])
    >>> i_gelu((x / GELU_SCALE).round().int()) * GELU_SCALE
    tensor([ 0.0000, -0.1628,  0.0000,  0.8372, 50.0001])
    """
    m = q.abs().clamp(max=2**GELU_BITS)
    out: Tensor = q.clamp(min=0) - ((m * i_erfc(m) + 2**ERF_BITS) >> (ERF_BITS + 1))
    return out


# ---- exp, softmax, tanh ----

EXP_A, EXP_B, EXP_C = 0.3585, 1.353, 0.34384
"""Eq. 13: ``exp(p) ≈ 0.3585 (p + 1.353)**2 + 0.344`` on (-ln 2, 0], whose largest error is 0.0021; with 0.34384 it is 0.00197."""
EXP_BITS = 14
EXP_SCALE = math.log(2) / 2**EXP_BITS
"""The scale of what :func:`i_exp` takes: ln 2 is 2**14, so the split of eq. 12 is a shift and a mask."""
_EXP_SHIFT = 15
_B, _C = round(EXP_B / EXP_SCALE), round(EXP_C / EXP_A / EXP_SCALE**2)
EXP_NUMBERS = EXP_BITS, _B, _C, _EXP_SHIFT - 1
"""All that :func:`i_exp` computes with, for kernels."""
EXP_OUT_SCALE = EXP_A * EXP_SCALE**2 * 2**_EXP_SHIFT
EXP_OF_0 = ((_B * _B + _C >> (_EXP_SHIFT - 1)) + 1) >> 1
"""What :func:`i_exp` gives for 0: its largest value, 16 bits."""
EXP_ZERO = 30 * math.log(2)
"""Below ``-EXP_ZERO`` (and from -11.8 on already) :func:`i_exp` is 0."""


def i_exp(q: Tensor) -> Tensor:
    """``exp(x)`` for ``x = q * EXP_SCALE <= 0``, at scale ``EXP_OUT_SCALE`` (2.1e-5), from 0 to ``EXP_OF_0``.

    Eq. 12: ``x = p - z ln 2`` with ``p`` in (-ln 2, 0]; eq. 13 for ``exp(p)``; then a shift right by ``z``, rounded half up.

    Bits: ``q > -2**31``; ``p + b < 2**15``, its square below ``2**30``, with ``c`` added ``1.559e9 < 2**31``; after a shift of 14 it has
    17 bits, and the rounding term at most 29. Error: below 0.002.
    """
    z = (-q) >> EXP_BITS
    p = _B - ((-q) & (2**EXP_BITS - 1))
    z = z.clamp(max=29)  # 17 bits shifted by 18 are 0 already
    half = torch.bitwise_left_shift(torch.ones_like(z), z)
    out: Tensor = ((p * p + _C >> (_EXP_SHIFT - 1)) + half) >> (z + 1)
    return out


SOFTMAX_BITS = 15
SOFTMAX_SCALE = 2.0**-SOFTMAX_BITS


def i_softmax(q: Tensor, least: int, multiplier: int, shift: int, wide: bool, dim: int = -1) -> Tensor:
    """``softmax(x)`` along ``dim``, at ``SOFTMAX_SCALE``, from 0 to 2**15.

    Section 3.5: the maximum is subtracted, differences are clamped to ``least`` (they are exp's zero there) and brought to
    ``EXP_SCALE``, :func:`i_exp`, then divided by the sum ``t``: ``e / t ≈ (e * r) >> 16`` with ``r = (2**31 - 2**15 - 1) // t``.

    Args:
        q: ``|q| < 2**30``, at any scale.
        least: the most negative difference that is kept, ``-EXP_ZERO`` at ``q``'s scale.
        multiplier, shift, wide: of the dyadic number ``scale / EXP_SCALE`` for integers up to ``-least``.

    Bits: the maximum has ``e = EXP_OF_0``, so ``t > 2**15`` and no sum divides by 0; ``t`` is kept in 64 bits, for no length
    overflows them. ``e <= t``, so ``e * r + 2**15 < 2**31``. A row whose keys are all hidden alike has equal weights.
    Error against float64: 0.0025, twice the exponential's; weights of 1 and 0 are exact to
    ``2**-15``, and the quantizer that follows clamps to 255 where its scale would make 256.
    """
    x = (q - q.amax(dim, keepdim=True)).clamp(min=least)
    e = i_exp(rescale(x, multiplier, shift, wide, -(31 << EXP_BITS), 0))
    r = ((2**31 - 2**15 - 1) // e.sum(dim, keepdim=True, dtype=torch.int64)).to(torch.int32)
    out: Tensor = (e * r + 2**15) >> 16
    return out


TANH_SCALE = EXP_SCALE / 2
TANH_BITS = 15
TANH_OUT_SCALE = 2.0**-TANH_BITS


def i_tanh(q: Tensor) -> Tensor:
    """``tanh(x)`` for ``x = q * TANH_SCALE``, at scale ``2**-15``, from -2**15 to 2**15.

    ``tanh|x| = (1 - e) / (1 + e)`` with ``e = exp(-2|x|)`` by :func:`i_exp`, whose value at 0 stands for 1, so ``tanh(0) = 0``. (The
    paper has no tanh: its pooler is in floating point.)

    Bits: ``|q| < 2**31``; ``(EXP_OF_0 - e) * 2**15 < 2**31``. Error: 0.002.
    """
    e = i_exp(-q.abs())
    out: Tensor = q.sign() * (((EXP_OF_0 - e) << TANH_BITS) // (EXP_OF_0 + e))
    return out


# ---- square root and LayerNorm ----


def i_sqrt(n: Tensor) -> Tensor:
    """``floor(sqrt(n))`` of int64 ``0 <= n < 2**62``, exact.

    Newton's iteration from ``2**ceil(bits / 2)`` (the paper's algorithm 4), six times. The start is above the root and at most twice
    it, and the relative error ``d`` becomes ``d**2 / (2 + 2d)``: 1, 0.25, 0.025, 3.1e-4, 4.7e-8, 1.1e-15. After five steps it is below
    ``2**-31``, so the integer is the floor or one above it, and a sixth step takes that away. A step never goes below the floor.

    64 bits: a sum of squares needs them. It has one value a row.
    """
    m = n.clamp(min=1)
    rest, bits = m, torch.zeros_like(m)
    for step in (32, 16, 8, 4, 2, 1):  # the number of bits, less one
        has = (rest >> step) > 0
        bits = torch.where(has, bits + step, bits)
        rest = torch.where(has, rest >> step, rest)
    x = torch.bitwise_left_shift(torch.ones_like(m), (bits + 2) >> 1)
    for _ in range(6):
        x = torch.minimum(x, (x + m // x) >> 1)
    return torch.where(n > 0, x, 0)


NORM_IN_BITS, NORM_BITS = 22, 20
"""Bits of what a norm takes, sign included; and ``2**20`` is a bound on what it gives."""


def norm_constants(width: int, scale: float, eps: float) -> tuple[int, int]:
    """``(k, e)``: how far :func:`i_normalize` scales its sum of squares up (``4**k``), and eps in its units, at least 1.

    ``4**k * width * 2**44 <= 2**61``, and ``e = round(4**k * width * eps / scale**2)``, at most ``2**61``.

    Raises:
        ValueError: ``width`` is above 2**17: its sum of squares does not fit.
    """
    k = (17 - (width - 1).bit_length()) // 2
    if k < 0:
        raise ValueError(f"a norm over {width} elements: its sum of squares needs more than 64 bits (at most {2**17} elements)")
    return k, round(min(max(4**k * width * eps / scale / scale, 1.0), 2.0**61))


def i_normalize(q: Tensor, k: int, e: int) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over the last axis, at scale ``sqrt(width) / 2**20``, from -2**20 to 2**20.

    LayerNorm without gamma and beta (section 3.6)::

        y = q - round(mean(q)),   s = i_sqrt(4**k * sum(y**2) + e),   out = (y * (2**62 // s)) >> (42 - k)

    Args:
        q: ``|q| <= 2**21``; its scale is in ``e`` alone.
        k, e: of :func:`norm_constants`.

    Bits, all in int64, for ``sum(y**2)`` needs up to 61: ``|y| <= 2**22``. ``(2**k * y)**2`` is a term of what the root is taken of,
    and ``i_sqrt`` is monotone and exact on squares, so ``s >= 2**k * |y|``, and ``|y| * (2**62 // s) <= 2**(62 - k)`` for every row.
    ``e >= 1``, so ``s >= 1``: a constant row gives 0. Error: half a step of the mean and of the result, ``2**-k`` of a step in ``s``.
    """
    width = q.shape[-1]
    x = q.to(torch.int64)
    y = x - (2 * x.sum(-1, keepdim=True) + width) // (2 * width)
    s = i_sqrt(((y * y).sum(-1, keepdim=True) << (2 * k)) + e)
    shift = 42 - k
    return ((y * (2**62 // s) + (1 << (shift - 1))) >> shift).to(torch.int32)


def norm_scale(width: int) -> float:
    """The scale of what :func:`i_normalize` gives."""
    return math.sqrt(width) / (1 << NORM_BITS)
