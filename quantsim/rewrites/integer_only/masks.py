"""Attention masks: made from ids in floating point, added or filled in as integers.

A mask that hides holds the most negative number of its type, which no scale can share with scores. What it means is "weight 0", so a
hidden score becomes an integer that lies ``EXP_ZERO`` below every score there can be, at which the integer exponential is 0. In a
row whose keys are all hidden, all weights are equal, as they are in floating point. A mask that was clamped (to −6) is a number like
another and is added.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from quantsim.numerics.polynomial import EXP_ZERO
from quantsim.quantizers.fake_quantizer import MASK_FLOOR
from quantsim.rewrites.integer_only.builder import Builder, unsupported
from quantsim.rewrites.integer_only.values import Choice, Constant, Ints, Value

aten = torch.ops.aten
SCORE_BITS = 24
ELEMENTWISE = frozenset("add sub rsub mul div neg clamp clamp_min clamp_max maximum minimum".split())


def of_ids(b: Builder, node: fx.Node, op: str) -> Choice | None:
    """A floating-point copy of a mask of zeros and ones (any other id counts as one)."""
    if op in ("to", "type_as", "_to_copy"):
        return Choice(b.emit(aten.ne.Scalar, b.plain(node.args[0], node), 0), 1.0, 0.0)  # type: ignore[arg-type]
    return None


def mapped(b: Builder, node: fx.Node) -> Choice:
    """``f(mask)`` of fixed numbers, worked out for the mask's two values."""
    values = [b.value.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
    choice = next(v for v in values if isinstance(v, Choice))

    def of(x: float) -> float:
        args = [_number(b, node, arg, x) for arg in node.args]
        assert callable(node.target)
        return float(node.target(*args, **node.kwargs))

    return Choice(choice.node, of(choice.hit), of(choice.miss))


def _number(b: Builder, node: fx.Node, arg: object, x: float) -> object:
    value = b.value[arg] if isinstance(arg, fx.Node) else arg
    if isinstance(value, Choice):
        return torch.tensor(x)
    if isinstance(value, Constant) and value.value.numel() == 1:
        return value.value.reshape(())
    if isinstance(arg, fx.Node):
        raise unsupported(node, "a mask that is combined with something else than fixed numbers")
    return arg


def is_mapped(b: Builder, node: fx.Node, op: str) -> bool:
    """The op works on one mask and fixed numbers."""
    inputs = [b.value[n] for n in node.all_input_nodes]
    fixed = all(isinstance(v, Choice) or (isinstance(v, Constant) and v.value.numel() == 1) for v in inputs)
    return op in ELEMENTWISE and fixed and sum(isinstance(v, Choice) for v in inputs) == 1


def add_mask(b: Builder, node: fx.Node, x: Value, mask: Choice) -> Value:
    """``x + mask``."""
    low, high = sorted((mask.hit, mask.miss))
    if low >= MASK_FLOOR:
        scores = b.ints(x, SCORE_BITS, node)
        steps = [round(value / scores.scale) for value in (mask.hit, mask.miss)]
        bound = scores.bound + max(map(abs, steps))
        if bound < 2**30:
            added = b.emit(aten.where.Scalar, mask.node, *steps)
            added = b.emit(aten.to.dtype, added, torch.int32)
            return Ints(b.emit(aten.add.Tensor, scores.node, added), scores.scale, bound)
    if high != 0:
        raise unsupported(node, f"a mask of {mask.hit:.4g} and {mask.miss:.4g}; expected 0 and a number that hides, or small numbers")
    return fill_mask(b, node, x, mask.node, low, when=mask.hit == low)


def fill_mask(b: Builder, node: fx.Node, x: Value, condition: fx.Node, value: float, when: bool) -> Value:
    """``value`` where the condition is ``when``, else ``x``; or, if both are masks, one mask more."""
    if isinstance(x, Choice):
        return _both(b, node, x, condition, value, when)
    scores = b.ints(x, SCORE_BITS, node)
    if value < MASK_FLOOR:
        filled = -(scores.bound + math.ceil(EXP_ZERO / abs(scores.scale)) + 1)
        if scores.scale < 0:
            filled = -filled
    else:
        filled = round(value / scores.scale)
    if abs(filled) >= 2**29:
        raise unsupported(node, f"a mask of {value:.4g} over scores of scale {scores.scale:.4g} needs more than 30 bits")
    if when:
        made = b.emit(aten.where.ScalarSelf, condition, filled, scores.node)
    else:
        made = b.emit(aten.where.ScalarOther, condition, scores.node, filled)
    return Ints(made, scores.scale, max(scores.bound, abs(filled)))


def _both(b: Builder, node: fx.Node, mask: Choice, condition: fx.Node, value: float, when: bool) -> Choice:
    if not when:
        condition = b.emit(aten.logical_not.default, condition)
    if value == mask.hit:
        return Choice(b.emit(aten.logical_or.default, mask.node, condition), mask.hit, mask.miss)
    if value == mask.miss:
        shown = b.emit(aten.logical_not.default, condition)
        return Choice(b.emit(aten.logical_and.default, mask.node, shown), mask.hit, mask.miss)
    raise unsupported(node, f"a mask of three values: {mask.hit:.4g}, {mask.miss:.4g} and {value:.4g}")
