"""What an op takes: values, parameters, and operands of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quantsim.rewrites.integer_only.builder import Builder, unsupported
from quantsim.rewrites.integer_only.values import Constant, IntegerError, Ints, Value


def operand(b: Builder, node: fx.Node, index: int) -> Value:
    arg = node.args[index]
    return b.value[arg] if isinstance(arg, fx.Node) else Constant(torch.tensor(float(arg), dtype=torch.float64))  # type: ignore[arg-type]


def constant(b: Builder, node: fx.Node, index: int) -> Tensor:
    value = b.value[node.args[index]]  # type: ignore[index]
    if not isinstance(value, Constant):
        raise unsupported(node, f"argument {index} is computed from inputs; a parameter was expected")
    return value.value


def eight_bits(b: Builder, node: fx.Node, index: int) -> Ints:
    """The operand of a product: an edge with a quantizer of at most 8 bits."""
    value = b.value[node.args[index]]  # type: ignore[index]
    if isinstance(value, Ints) and value.dtype in (torch.int8, torch.uint8) and value.scale > 0:
        return value
    raise IntegerError(
        f"{node.name}: what it reads ({node.args[index]}) has no scale of 8 bits. Every edge that a linear or matmul reads needs a "
        "calibrated quantizer of at most 8 bits; preset 'ibert' places them"
    )
