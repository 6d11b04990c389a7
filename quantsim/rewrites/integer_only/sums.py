"""Sums, fixed and computed factors, and concatenation: operands are brought to one scale, or scales are multiplied."""

from __future__ import annotations

import math

import torch
from torch import fx

from quantsim.rewrites.integer_only.arguments import operand
from quantsim.rewrites.integer_only.builder import FACTOR_BITS, SUM_BITS, Builder, unsupported
from quantsim.rewrites.integer_only.masks import add_mask
from quantsim.rewrites.integer_only.values import Channels, Choice, Constant, Floats, Ints, Value

aten = torch.ops.aten


def add(b: Builder, node: fx.Node) -> Value:
    return sum_of(b, node, 1.0)


def sub(b: Builder, node: fx.Node) -> Value:
    return sum_of(b, node, -1.0)


def sum_of(b: Builder, node: fx.Node, sign: float) -> Value:
    """``a + b``, ``a - b``: two rescales to a scale at which both bounds together fit, and an add."""
    x, y = operand(b, node, 0), operand(b, node, 1)
    sign *= float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    if isinstance(x, Constant) and isinstance(y, Constant):
        return Constant(x.value + sign * y.value)
    if isinstance(y, Choice):
        return add_mask(b, node, x, Choice(y.node, sign * y.hit, sign * y.miss))
    if isinstance(x, Choice):
        return add_mask(b, node, times(b, node, y, sign), x)
    y = times(b, node, y, sign)
    scale = b.scale_for(b.largest(b.known(x, node)) + b.largest(b.known(y, node)), SUM_BITS)
    sides = [b.at(side, scale, node) for side in (x, y)]
    bound = sides[0].bound + sides[1].bound
    return Ints(b.emit(aten.add.Tensor, sides[0].node, sides[1].node), scale, bound)


def mul(b: Builder, node: fx.Node) -> Value:
    x, y = operand(b, node, 0), operand(b, node, 1)
    for one, other in ((x, y), (y, x)):
        if isinstance(other, Constant) and other.value.numel() == 1:
            return times(b, node, one, float(other.value))
    if isinstance(x, Constant) and isinstance(y, Constant):
        return Constant(x.value * y.value)
    left, right = b.ints(b.known(x, node), FACTOR_BITS, node), b.ints(b.known(y, node), FACTOR_BITS, node)
    return Ints(b.emit(aten.mul.Tensor, left.node, right.node), left.scale * right.scale, left.bound * right.bound)


def div(b: Builder, node: fx.Node) -> Value:
    x, y = operand(b, node, 0), operand(b, node, 1)
    if not (isinstance(y, Constant) and y.value.numel() == 1 and float(y.value) != 0):
        raise unsupported(node, "a division by something that is computed; only by a fixed number")
    return times(b, node, x, 1.0 / float(y.value))


def neg(b: Builder, node: fx.Node) -> Value:
    return times(b, node, operand(b, node, 0), -1.0)


def times(b: Builder, node: fx.Node, x: Value, factor: float) -> Value:
    """A fixed factor changes the scale, and no integer."""
    if factor == 0 or not math.isfinite(factor):
        raise unsupported(node, f"a factor of {factor}")
    if factor == 1.0:
        return x
    if isinstance(x, Constant):
        return Constant(x.value * factor)
    if isinstance(x, Channels):
        return x.times(factor)
    if isinstance(x, Ints):
        return Ints(x.node, x.scale * factor, x.bound, x.zero_point, x.dtype)
    b.known(x, node)
    assert isinstance(x, Floats)
    return Floats(b.emit(aten.mul.Tensor, x.node, factor), x.largest * abs(factor))


def cat(b: Builder, node: fx.Node) -> Value:
    """``cat`` and ``stack``: all parts at one scale."""
    parts = [b.value[n] for n in node.args[0]]  # type: ignore[union-attr, index]
    same = {(p.scale, p.zero_point, p.dtype) for p in parts if isinstance(p, Ints)}
    if len(same) > 1 or not all(isinstance(p, Ints) for p in parts):
        scale = b.scale_for(max(b.largest(b.known(p, node)) for p in parts), SUM_BITS)
        parts = [b.at(p, scale, node) for p in parts]
    kept = [p for p in parts if isinstance(p, Ints)]
    assert callable(node.target)
    whole = b.emit(node.target, [p.node for p in kept], *node.args[1:], **node.kwargs)
    return Ints(whole, kept[0].scale, max(p.bound for p in kept), kept[0].zero_point, kept[0].dtype)
