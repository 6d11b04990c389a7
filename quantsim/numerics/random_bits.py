"""Random numbers by counter: the number at a place follows from a key and the place alone, not from what was drawn before.

So values don't hang on the number of threads, on the order of ops, or on whether a kernel is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANDOM_BITS = 24
"""Of each number: as many as a float32 holds, so that ``number * 2**-24`` in ``[0, 1)`` is exact."""

_WORD = 2**64 - 1


def stream_of(*numbers: int) -> tuple[int, int]:
    """Two 32-bit keys for any integers: nearby integers, or the same in another order, give unrelated keys.

    Each number is mixed in by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).

    >>> stream_of(1, 2) == stream_of(1, 2), stream_of(1, 2) == stream_of(2, 1)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return _signed(state), _signed(state >> 32)


def random_bits(keys: Tensor, start: int, count: int) -> Tensor:
    """``count`` numbers from ``0`` to ``2**24 - 1`` at the places from ``start`` on, as int32.

    A hash of the place: multiplied by an odd number and moved by the first key, then xor-shifts and multiplications (the constants
    are of Wellons' ``lowbias32``), the second key xored in between, so that no stream is another one shifted.

    Args:
        keys: int32 ``[2]``, of :func:`stream_of`.
        start, count: places; below ``2**31``.
    """
    h = torch.arange(start, start + count, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1) + keys[0]
    h = (h ^ _shifted(h, 16)) * 0x21F0AAAD ^ keys[1]
    h = (h ^ _shifted(h, 15)) * 0x735A2D97
    return _shifted(h ^ _shifted(h, 15), 32 - RANDOM_BITS)


def _shifted(h: Tensor, by: int) -> Tensor:
    """A logical shift to the right of int32, which torch has for unsigned integers alone."""
    return (h >> by) & ((1 << (32 - by)) - 1)


def _signed(word: int) -> int:
    """The low 32 bits as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31
