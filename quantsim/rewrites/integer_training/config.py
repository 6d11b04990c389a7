"""What is trained in integers, with how many bits, rounded how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from quantsim.config import ConfigError, near
from quantsim.numerics.fixed_point import FixedPointError, check_bits

Rounding = Literal["stochastic", "nearest"]
Exponents = Literal["row", "tensor"]
Kind = Literal["linear", "convolution", "layer_norm", "embedding", "matmul"]
Operand = Literal["weight", "activation", "gradient"]

OPERANDS: tuple[Operand, ...] = get_args(Operand)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class IntegerConfig:
    """Forward and backward in integers.

    Attributes:
        weight_bits, activation_bits, gradient_bits: 4 to 16, the sign among them.
        weight_rounding, activation_rounding, gradient_rounding: ``"stochastic"`` or ``"nearest"``. Gradients are rounded
            stochastically, as their sums over steps must be unbiased; the forward to the nearest, with half the mean square error
            and the values that evaluation sees (the paper doesn't say). In eval mode all are rounded to the nearest, so that
            evaluation is deterministic.
        exponents: ``"row"``: for a linear an exponent for each token of its input, each output of its weight, and each token or output
            of its gradient (``products``); for a LayerNorm one for each token; for an embedding one for each row of the table. All else,
            convolutions and products of activations too, has one exponent a tensor. ``"tensor"``: everything has, as published; 8 bits
            then lose much beside outliers.
        ops: the kinds of ops that become integer ones. ``"matmul"`` are products of two activations, as in attention; the paper
            doesn't name them, and they are left in float by default.
        keep_float: patterns (``fnmatch``) of op names to leave in float, as ``("classifier.*",)``.

    Raises:
        ConfigError: bits out of range, an unknown rounding or kind of op.

    >>> IntegerConfig(weight_bits=3)
    Traceback (most recent call last):
    quantsim.config.ConfigError: weight_bits: 3; expected an integer from 4 to 16
    """

    weight_bits: int = 8
    activation_bits: int = 8
    gradient_bits: int = 8
    weight_rounding: Rounding = "nearest"
    activation_rounding: Rounding = "nearest"
    gradient_rounding: Rounding = "stochastic"
    exponents: Exponents = "row"
    ops: tuple[Kind, ...] = ("linear", "convolution", "layer_norm", "embedding")
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for operand in OPERANDS:
            try:
                check_bits(self.bits(operand), f"{operand}_bits")
            except FixedPointError as error:
                raise ConfigError(str(error)) from None
            if self.rounding(operand) not in get_args(Rounding):
                raise ConfigError(f"{operand}_rounding: {self.rounding(operand)!r}; expected {' or '.join(get_args(Rounding))}")
        if self.exponents not in get_args(Exponents):
            raise ConfigError(f"exponents: {self.exponents!r}; expected {' or '.join(get_args(Exponents))}")
        for name in ("ops", "keep_float"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: {getattr(self, name)!r}; expected a tuple of names")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind in self.ops:
            if kind not in KINDS:
                raise ConfigError(f"ops: {kind!r}; the kinds are {', '.join(KINDS)} (nearest: {near(kind, KINDS, 1)})")

    def bits(self, operand: Operand) -> int:
        return getattr(self, f"{operand}_bits")  # type: ignore[no-any-return]

    def rounding(self, operand: Operand) -> Rounding:
        return getattr(self, f"{operand}_rounding")  # type: ignore[no-any-return]

    def __str__(self) -> str:
        parts = (f"{operand}s {self.bits(operand)} bits {self.rounding(operand)}" for operand in OPERANDS)
        return ", ".join((*parts, f"an exponent a {self.exponents}"))
