"""Ops that move values, masks, and clamps."""

from __future__ import annotations

import torch
from torch import fx

from quantsim.graph.roles import op_of
from quantsim.rewrites.integer_only.arguments import operand
from quantsim.rewrites.integer_only.builder import FACTOR_BITS, SUM_BITS, Builder, unsupported
from quantsim.rewrites.integer_only.masks import fill_mask
from quantsim.rewrites.integer_only.values import Channels, Choice, Constant, Floats, Ints, Value

aten = torch.ops.aten


def move(b: Builder, node: fx.Node) -> Value:
    """An op that keeps the grid is done on the integers; one that changes the type of floating-point numbers is left out."""
    x = operand(b, node, 0)
    if op_of(node, b.source) in ("to", "type_as", "clone", "detach", "dropout") and not isinstance(x, Choice):
        return x
    if isinstance(x, Constant):
        x = b.ints(x, FACTOR_BITS, node)
    if isinstance(x, Channels):
        x = b.ints(x, SUM_BITS, node)
    assert isinstance(x, (Ints, Floats, Choice))
    target = aten.reshape.default if node.target is aten.view.default else node.target
    assert callable(target)
    rest = fx.map_arg(node.args[1:], lambda n: b.plain(n, node))
    kwargs = fx.map_arg(node.kwargs, lambda n: b.plain(n, node))
    if op_of(node, b.source) in ("to", "type_as"):
        return x  # a mask of another floating-point type
    moved = b.emit(target, x.node, *rest, **kwargs)
    if isinstance(x, Choice):
        return Choice(moved, x.hit, x.miss)
    if isinstance(x, Floats):
        return Floats(moved, x.largest)
    return Ints(moved, x.scale, x.bound, x.zero_point, x.dtype)


def masked_fill(b: Builder, node: fx.Node) -> Value:
    x, hidden, value = operand(b, node, 0), b.plain(node.args[1], node), operand(b, node, 2)  # type: ignore[arg-type]
    return fill_mask(b, node, x, hidden, number(node, value), when=True)


def where(b: Builder, node: fx.Node) -> Value:
    condition = b.plain(node.args[0], node)  # type: ignore[arg-type]
    x, y = operand(b, node, 1), operand(b, node, 2)
    if isinstance(x, Constant) and isinstance(y, Constant):
        return Choice(condition, number(node, x), number(node, y))
    if isinstance(y, Constant):
        return fill_mask(b, node, x, condition, number(node, y), when=False)
    return fill_mask(b, node, y, condition, number(node, x), when=True)


def number(node: fx.Node, value: Value) -> float:
    if not isinstance(value, Constant) or value.value.numel() != 1:
        raise unsupported(node, "a choice between two computed tensors; only a mask with a fixed value")
    return float(value.value)


def clamp(b: Builder, node: fx.Node) -> Value:
    """A clamp of computed values, at its ends' nearest integers."""
    q = b.ints(operand(b, node, 0), 31, node)
    ends = [node.args[i] if len(node.args) > i else node.kwargs.get(name) for i, name in ((1, "min"), (2, "max"))]
    low, high = (None if end is None else round(float(end) / q.scale) for end in ends)  # type: ignore[arg-type]
    if q.scale < 0:
        low, high = high, low
    return Ints(b.emit(aten.clamp.default, q.node, low, high), q.scale, q.bound)
