"""Rescaling integers by integers: from one scale to another without a division and without a float.

A ratio of two scales is a dyadic number, ``ratio ≈ multiplier / 2**shift``, and an integer at the first scale becomes one at the second::

    out = floor((q * multiplier + 2**(shift - 1)) / 2**shift)

which is ``q * ratio`` rounded half up (Kim et al., I-BERT, arXiv 2101.01321, section 3.1; Jacob et al. 2018). Multiplier and shift are
plain numbers, worked out before anything runs, from a bound on ``|q|`` that makes overflow impossible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
LEAST_BITS = 12
"""A multiplier in a 32-bit product has at least so many bits; with fewer left, the product is computed in 64 bits."""


class OverflowRisk(ValueError):
    """Integers that no budget of 32 bits (64 inside a product) can hold; raised before anything runs."""


@dataclass(frozen=True)
class Dyadic:
    """``multiplier / 2**shift``.

    Attributes:
        wide: the product ``q * multiplier`` needs 64 bits.
        low, high: what the result is clamped to.
    """

    multiplier: int
    shift: int
    wide: bool
    low: int = -INT32_MAX
    high: int = INT32_MAX

    @property
    def numbers(self) -> tuple[int, int, bool, int, int]:
        """As the arguments of :func:`rescale` after the tensor."""
        return self.multiplier, self.shift, self.wide, self.low, self.high


def dyadic(ratio: float, bound: int, low: int = -INT32_MAX, high: int = INT32_MAX) -> Dyadic:
    """The dyadic number for ``ratio``, for integers with ``|q| <= bound``.

    ``(f, e) = frexp(ratio)``, ``multiplier = round(f * 2**p)``, ``shift = p - e``, at least 0. With ``b`` the bits of ``bound``,
    ``p = 30 - b`` where that is at least ``LEAST_BITS`` and ``bound * ratio < 2**30``: then ``|q| * multiplier <= 2**30``, the rounding
    term is at most ``2**30`` (``shift <= 31``), and one of both is less. Else ``p = 31`` and the product (at most ``2**62``, its rounding
    term at most ``2**61``) takes 64 bits.

    Error: ``|out - q * ratio| <= 1/2 + max(|q * ratio| * 2**-p, 2**-13)`` before clamping.

    Raises:
        OverflowRisk: ``bound`` is above 32 bits, or ``bound * ratio`` above 62.

    >>> dyadic(0.1, 127)
    Dyadic(multiplier=6710886, shift=26, wide=False, low=-2147483647, high=2147483647)
    """
    if not (math.isfinite(ratio) and ratio >= 0):
        raise OverflowRisk(f"ratio of scales is {ratio}; expected a finite number that is not negative")
    if not 0 <= bound <= INT32_MAX:
        raise OverflowRisk(f"integers up to {bound}; expected at most {INT32_MAX}, what 32 bits hold")
    if bound * ratio >= 2**62:
        raise OverflowRisk(f"integers up to {bound} times {ratio:.4g} need more than 64 bits")
    fraction, exponent = math.frexp(ratio)
    bits = 30 - bound.bit_length()
    wide = bits < LEAST_BITS or bound * ratio >= 2**30
    shift = max(0, min((31 if wide else bits) - exponent, 62 if wide else 31))
    return Dyadic(round(math.ldexp(fraction, shift + exponent)), shift, wide, low, high)


def rescale(
    q: Tensor, multiplier: int, shift: int, wide: bool, low: int, high: int, zero_point: int = 0, dtype: torch.dtype = torch.int32
) -> Tensor:
    """``clamp((q * multiplier + 2**(shift - 1)) >> shift, low, high) + zero_point`` as ``dtype``.

    Bit budget: see :func:`dyadic`, which makes the numbers.

    >>> rescale(torch.tensor([-50, 4, 6, 2000]), *dyadic(0.1, 2000, -128, 127).numbers, dtype=torch.int8)
    tensor([ -5,   0,   1, 127], dtype=torch.int8)
    """
    y = q.to(torch.int64 if wide else torch.int32) * multiplier
    if shift:
        y = y.add_(1 << (shift - 1)).bitwise_right_shift_(shift)
    y = y.clamp_(low, high)
    return (y.add_(zero_point) if zero_point else y).to(dtype)


@dataclass(frozen=True)
class ChannelRescale:
    """A rescale whose ratio and offset differ along the last axis: ``multiplier`` and ``offset``, int64 ``[C]``, share one ``shift``."""

    multiplier: Tensor
    offset: Tensor
    shift: int


def channel_rescale(ratio: Tensor, offset: Tensor, bound: Tensor) -> ChannelRescale:
    """The numbers for ``q * ratio + offset`` with ``|q| <= bound``.

    Args:
        ratio: float64 ``[C]``, any sign, zero too.
        offset: float64 ``[C]``, in units of the result.
        bound: float64 ``[C]``, at most ``2**31``.

    With ``top = max(bound * |ratio| + |offset|)`` and ``shift = min(40, 61 - bits(top))``, everything that is added is at most
    ``2**61`` (and what rounding the numbers adds, ``2**31``), which 64 bits hold. Nothing divides by the ratio, so a channel whose weights
    or gamma are 0 keeps its offset, whatever their scale.

    Error: ``|out - (q * ratio + offset)| <= 1/2 + (bound / 2 + 1/2) * 2**-shift``, which is below ``1/2 + 2**-9`` where the result
    has 21 bits or fewer.
    """
    top = float((bound * ratio.abs() + offset.abs()).max())
    if not math.isfinite(top) or top >= 2.0**60:
        raise OverflowRisk(f"results up to {top:.4g} steps of the next scale; expected less than 2**60")
    shift = min(40, 61 - math.ceil(top).bit_length())
    scaled = torch.ldexp(ratio, torch.tensor(shift)), torch.ldexp(offset, torch.tensor(shift))
    half = (1 << shift) >> 1
    return ChannelRescale(scaled[0].round().to(torch.int64), scaled[1].round().to(torch.int64) + half, shift)


def rescale_channels(
    q: Tensor, multiplier: Tensor, offset: Tensor, shift: int, low: int, high: int, dtype: torch.dtype = torch.int32
) -> Tensor:
    """``clamp((q * multiplier + offset) >> shift, low, high)`` as ``dtype``; ``q`` is ``[..., C]``.

    Bit budget: 64 bits, see :func:`channel_rescale`, which makes the numbers (``offset`` has the rounding term in it).
    """
    return (q.to(torch.int64) * multiplier).add_(offset).bitwise_right_shift_(shift).clamp_(low, high).to(dtype)
