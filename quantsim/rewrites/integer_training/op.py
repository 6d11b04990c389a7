"""What every integer op shares: its name and number, how it maps its operands, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantsim.kernels.mapping import to_fixed_point, to_fixed_point_by
from quantsim.numerics.fixed_point import FixedPoint
from quantsim.numerics.random_bits import stream_of
from quantsim.rewrites.integer_training.config import OPERANDS, IntegerConfig, Operand


@dataclass(frozen=True)
class Mapper:
    """Maps the operands of one op in one forward and its backward.

    Attributes:
        name: of the op, for messages.
        number: of the op in its graph; each op and operand has random numbers of its own.
        config: bits and rounding.
        key: of this forward; ``None`` rounds to the nearest.
    """

    name: str
    number: int
    config: IntegerConfig
    key: int | None

    def map(
        self,
        x: Tensor,
        operand: Operand,
        slot: int = 0,
        *,
        exponent: int | None = None,
        axis: int | None = None,
        times: Tensor | None = None,
    ) -> FixedPoint:
        """``x`` as integers; ``slot`` tells two operands of a kind apart.

        Args:
            exponent: of a larger tensor that ``x`` is a part of.
            axis: where ``config.exponents`` is ``"row"``, a matrix gets an exponent for each row (0) or column (1).
            times: exponents that the matrix is multiplied by first, along its other axis.

        Raises:
            FixedPointError: NaN or infinity in ``x``; the message names the op and the operand.
        """
        stream = None
        if self.key is not None and self.config.rounding(operand) == "stochastic":
            stream = stream_of(self.key, self.number, OPERANDS.index(operand), slot)
        bits, what = self.config.bits(operand), f"{self.name}, {operand}"
        if axis is None or self.config.exponents == "tensor":
            return to_fixed_point(x, bits, stream, exponent=exponent, what=what)
        return to_fixed_point_by(axis, x, bits, stream, times=times, what=what)


class IntegerOp(nn.Module):
    """A node of the graph: an autograd function with its name, number and config. It holds no weights."""

    def __init__(self, function: Callable[..., Tensor], name: str, number: int, config: IntegerConfig) -> None:
        super().__init__()
        self.function, self.name, self.number, self.config = function, name, number, config

    def forward(self, key: int | None, *args: Any) -> Tensor:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):  # it would round exact integers to bf16
            return self.function(Mapper(self.name, self.number, self.config, key), *args)

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, {self.config}"


def keep(ctx: Any, *values: FixedPoint, also: tuple[Tensor | None, ...] = ()) -> None:
    """Save mantissas, as the integers they are, for backward."""
    ctx.save_for_backward(*(value.mantissa for value in values), *also)
    ctx.scales = tuple((value.exponent, value.bits) for value in values)


def kept(ctx: Any) -> tuple[list[FixedPoint], tuple[Tensor | None, ...]]:
    """What :func:`keep` saved."""
    tensors, count = ctx.saved_tensors, len(ctx.scales)
    found = [FixedPoint(m, *scale) for m, scale in zip(tensors[:count], ctx.scales, strict=True)]
    return found, tensors[count:]
