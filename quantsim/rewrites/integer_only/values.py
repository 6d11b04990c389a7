"""What a node of the simulation becomes: integers with a scale and a proven bound, or something that leads to them.

Bounds are followed from op to op while the graph is built, so every shift and multiplier is chosen to be unable to overflow, whatever
the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx


class IntegerError(ValueError):
    """A simulation that cannot be computed on integers alone; the message names the edge and says what to do."""


@dataclass(frozen=True)
class Ints:
    """An edge: ``x = (q - zero_point) * scale`` with ``|q - zero_point| <= bound``; ``q`` is what ``node`` gives, of ``dtype``."""

    node: fx.Node
    scale: float
    bound: int
    zero_point: int = 0
    dtype: torch.dtype = torch.int32


@dataclass(frozen=True)
class Channels:
    """A product or a norm before it is rescaled: ``x = q * scale + offset`` along the last axis, ``|q| <= bound``; float64 ``[C]`` each."""

    node: fx.Node
    scale: Tensor
    offset: Tensor
    bound: Tensor

    def times(self, factor: float) -> Channels:
        return Channels(self.node, self.scale * factor, self.offset * factor, self.bound)

    @property
    def largest(self) -> float:
        return float((self.scale.abs() * self.bound + self.offset.abs()).max())


@dataclass(frozen=True)
class Choice:
    """A floating-point tensor made from ids alone that holds two values (a mask): ``hit`` where the boolean node is true, else ``miss``."""

    node: fx.Node
    hit: float
    miss: float


@dataclass(frozen=True)
class Constant:
    """A tensor known while the graph is built: a parameter, or what is computed from parameters alone."""

    value: Tensor


@dataclass(frozen=True)
class Floats:
    """Floating point, because it was asked for (``force_dequant``): ``|x| <= largest``."""

    node: fx.Node
    largest: float


Value = Ints | Channels | Choice | Constant | Floats | fx.Node
"""A plain node is one that holds no floating-point numbers: ids, booleans, sizes; it is copied as it is."""
