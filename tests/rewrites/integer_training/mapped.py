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
    """Every operand is rounded stochastically and has one exponent, unless ``changes`` says otherwise or there is no key."""
    settings = {f"{operand}_rounding": "stochastic" for operand in OPERANDS} | {"exponents": "tensor"}
    return Mapper("layer.dense", 3, IntegerConfig(*bits, **(settings | changes)), key)


def value(m: Mapper, x: Tensor, operand: Operand, **how: Any) -> Tensor:
    """``x_hat``, in float64."""
    return m.map(x.detach(), operand, **how).value().double()


def step(m: Mapper, x: Tensor, operand: Operand, **how: Any) -> Any:
    """A number; with an ``axis``, and exponents of rows, ``[n, 1]`` or ``[1, m]``."""
    return m.map(x.detach(), operand, **how).step


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()
