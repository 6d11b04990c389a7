"""How loud quantization noise is, in decibels."""

from __future__ import annotations

import math


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(signal / noise)``, in dB.

    Args:
        signal: ``sum x^2``.
        noise: ``sum (x - x_hat)^2``, over the same elements.

    Without noise it is infinite; with noise and no signal, minus infinity. Six dB are one bit.

    >>> sqnr_db(signal=100.0, noise=1.0)
    20.0
    >>> sqnr_db(signal=1.0, noise=0.0)
    inf
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
