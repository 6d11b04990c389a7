"""What the tests of all integer ops share: a mapper, and its operands as float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantsim.rewrites.integer_training import IntegerConfig
from quantsim.rewrites.integer_training.config import OPERANDS, Operand
from quantsim.rewrites.integer_training.op import Mapper

U = 2.0**-24
BITS = [(8, 8, 8), (4, 6, 5), (10, 10, 10), (12, 8, 16), (16, 16, 16)]


def mapper(bits: tuple[int, int, int] = (8, 8, 8), key: int | None = 11, **changes: Any) -> Mapper:
    """Every operand is rounded stochastically, unless ``changes`` says otherwise or there is no key."""
    rounding = {f"{operand}_rounding": "stochastic" for operand in OPERANDS}
    return Mapper("layer.dense", 3, IntegerConfig(*bits, **(rounding | changes)), key)


def value(m: Mapper, x: Tensor, operand: Operand) -> Tensor:
    """``x_hat``, in float64."""
    return m.map(x.detach(), operand).value().double()


def step(m: Mapper, x: Tensor, operand: Operand) -> float:
    return m.map(x.detach(), operand).step


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()
