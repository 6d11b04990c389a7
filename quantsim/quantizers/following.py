"""Quantizers whose range follows the values while the model is trained (Q8BERT, Zafrir et al., 2019, section 3).

With the largest magnitude ``m`` of a tensor (symmetric grids; else its least and greatest value, each so)::

    ema      M <- m at the first, then M <- momentum * M + (1 - momentum) * m;    range [-M, M]
    dynamic  M <- m
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsim.config import QuantSpec
from quantsim.kernels.edges import to_integers
from quantsim.numerics.affine import affine_params
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State, WeightQuantizer
from quantsim.quantizers.range_estimators import min_max


class FollowingQuantizer(FakeQuantizer):
    """An activation's. In evaluation an average stays as it is, and ``dynamic`` takes the range of what passes.

    Begins ``WAITING``: the first tensor in training sets the range, after ``start_step`` that pass in floating point. Calibration sets
    it too. Every forward pass in training counts, so ``start_step`` counts accumulated batches, not optimizer steps; and each of
    several processes follows the batches of its own.

    Attributes:
        steps: how many passed; there where ``spec.start_step`` is not 0, and not part of a checkpoint for inference.
    """

    steps: Tensor

    def __init__(self, spec: QuantSpec, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name, channels)
        if spec.start_step:
            self.register_buffer("steps", torch.tensor(0))
        self.state = State.WAITING

    def forward(self, x: Tensor) -> Tensor:
        if self.state in (State.WAITING, State.FOLLOWING) and self._moves():
            self._follow(x.detach())
        return super().forward(x)

    def _moves(self) -> bool:
        """Whether this pass moves the range."""
        return self.training or (self.spec.follow == "dynamic" and self.state is State.FOLLOWING)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        super().set_range(*_symmetric(low, high) if self.spec.symmetric else (low, high))

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        if self.state is State.WAITING and self.spec.start_step and self.steps < self.spec.start_step:
            self.steps += 1
            return
        low, high = range_of(x, self.spec)
        if self.spec.follow == "ema" and self.state is State.FOLLOWING:
            low, high = (torch.lerp(new, past, self.spec.momentum) for new, past in ((low, self.min), (high, self.max)))
        self.check_range(low, high)
        self.set_range(low, high)


class DynamicIntegers(nn.Module):
    """What a ``dynamic`` quantizer computes in evaluation, as the integers themselves, for a graph that is lowered to them.

    Args:
        spec: of the quantizer: at most 8 bits, one range.
        name: of its edge.
    """

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name = spec, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` → integers of its shape (``int8``, or ``uint8`` where the grid is asymmetric), scale and zero point ``[]``."""
        params = affine_params(*range_of(x, self.spec), self.spec)
        q = to_integers(x, params.scale, params.zero_point, params.quant_min, params.quant_max)
        return q, params.scale, params.zero_point

    def extra_repr(self) -> str:
        return f"{self.name}: {self.spec}"


def moves_with_tensors(quantizer: FakeQuantizer) -> bool:
    """In evaluation its range is that of each tensor which passes; a weight's is not."""
    of_values = not isinstance(quantizer, WeightQuantizer)
    return of_values and quantizer.spec.follow == "dynamic" and quantizer.state is State.FOLLOWING


def range_of(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends of the tensor's own range, ``[]`` or ``[C]`` along ``spec.axis``: ``[-m, m]`` for a symmetric grid."""
    low, high = min_max(x, spec.axis)
    return _symmetric(low, high) if spec.symmetric else (low, high)


def _symmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    high = torch.maximum(high, -low)
    return -high, high


class FollowingWeightQuantizer(FollowingQuantizer, WeightQuantizer):
    """A weight's: it moves in training alone, and is frozen in evaluation."""

    def _moves(self) -> bool:
        return self.training
