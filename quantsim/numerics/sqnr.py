"""How loud quantization noise is, in decibels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    return 10 * math.log10(signal / noise) if signal / noise else -math.inf


@dataclass(frozen=True)
class Noise:
    """Sums of squares over the same elements; two of them add up.

    Attributes:
        signal: ``sum x^2``.
        noise: ``sum (x - x_hat)^2``.
    """

    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def between(cls, x: Tensor, x_hat: Tensor) -> Noise:
        """Of a tensor and what became of it, in float64."""
        wide = x.detach().double().flatten()
        error = wide - x_hat.detach().flatten()
        return cls(torch.dot(wide, wide).item(), torch.dot(error, error).item())

    @property
    def db(self) -> float:
        """The SQNR in dB."""
        return sqnr_db(self.signal, self.noise)

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.signal + other.signal, self.noise + other.noise)
