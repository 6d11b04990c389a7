"""Nonlinear functions: polynomials and an integer square root, or, where it is asked for, the op itself in floating point."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from quantsim.numerics.dyadic import dyadic
from quantsim.numerics.polynomial import (
    EXP_SCALE,
    EXP_ZERO,
    GELU_SCALE,
    NORM_BITS,
    NORM_IN_BITS,
    SOFTMAX_SCALE,
    TANH_OUT_SCALE,
    TANH_SCALE,
    i_gelu,
    i_normalize,
    i_softmax,
    i_tanh,
    norm_constants,
    norm_scale,
)
from quantsim.rewrites.integer_only.arguments import constant
from quantsim.rewrites.integer_only.builder import Builder, unsupported
from quantsim.rewrites.integer_only.values import Channels, Floats, Ints, Value

aten = torch.ops.aten


def layer_norm(b: Builder, node: fx.Node) -> Value:
    x, shape = b.value[node.args[0]], node.args[1]  # type: ignore[index]
    if not isinstance(shape, (list, tuple)) or len(shape) != 1 or not isinstance(shape[0], int):
        raise unsupported(node, f"a norm over {shape}; on integers a norm is over the last axis, of a fixed size")
    width, eps = shape[0], float(node.args[4]) if len(node.args) > 4 else 1e-5  # type: ignore[arg-type]
    gamma, beta = (
        constant(b, node, i).double() if len(node.args) > i and node.args[i] is not None else torch.full((width,), fill).double()
        for i, fill in ((2, 1.0), (3, 0.0))
    )
    largest = float((gamma.abs() * math.sqrt(width) + beta.abs()).max())
    if "layer_norm" in b.forced:
        return in_float(b, node, largest, gamma=gamma, beta=beta)
    q = b.ints(x, NORM_IN_BITS, node)
    try:
        numbers = norm_constants(width, abs(q.scale), eps)
    except ValueError as error:
        raise unsupported(node, str(error)) from error
    normal = b.emit(i_normalize, q.node, *numbers)
    sign = math.copysign(1.0, q.scale)
    return Channels(normal, sign * gamma * norm_scale(width), beta, torch.full((width,), 2.0**NORM_BITS, dtype=torch.float64))


def softmax(b: Builder, node: fx.Node) -> Value:
    if "softmax" in b.forced:
        return in_float(b, node, 1.0)
    q = b.ints(b.value[node.args[0]], 29, node)  # type: ignore[index]
    if q.scale < 0:
        q = Ints(b.emit(aten.neg.default, q.node), -q.scale, q.bound)
    least = min(math.ceil(EXP_ZERO / q.scale), 2 * q.bound + 1)
    numbers = dyadic(min(q.scale / EXP_SCALE, 2 * EXP_ZERO / EXP_SCALE), least)
    node_ = b.emit(i_softmax, q.node, -least, numbers.multiplier, numbers.shift, numbers.wide, node.args[1])
    return Ints(node_, SOFTMAX_SCALE, 2**15)


def gelu(b: Builder, node: fx.Node) -> Value:
    x = b.value[node.args[0]]  # type: ignore[index]
    if "gelu" in b.forced:
        return in_float(b, node, b.largest(x))
    q = b.at(x, GELU_SCALE, node, limit=2**30)
    return Ints(b.emit(i_gelu, q.node), GELU_SCALE, q.bound)


def tanh(b: Builder, node: fx.Node) -> Value:
    if "tanh" in b.forced:
        return in_float(b, node, 1.0)
    q = b.at(b.value[node.args[0]], TANH_SCALE, node, limit=2**20)  # type: ignore[index]
    return Ints(b.emit(i_tanh, q.node), TANH_OUT_SCALE, 2**15)


def relu(b: Builder, node: fx.Node) -> Value:
    q = b.ints(b.value[node.args[0]], 31, node)  # type: ignore[index]
    bounds = {"min": 0} if q.scale > 0 else {"max": 0}
    return Ints(b.emit(aten.clamp.default, q.node, **bounds), q.scale, q.bound)


def in_float(b: Builder, node: fx.Node, largest: float, **norm: Tensor) -> Floats:
    """The op itself, between a dequantization and the next rescale."""
    x = b.dequantized(b.value[node.args[0]], node)  # type: ignore[index]
    rest: list[Any] = list(node.args[1:])
    if norm:
        rest[1:3] = [b.keep(norm["gamma"].float()), b.keep(norm["beta"].float())]
    op = b.source.get_submodule(str(node.target)).aten if node.op == "call_module" else node.target
    assert callable(op)
    return Floats(b.emit(op, x, *rest, **node.kwargs), largest * (1 + 2.0**-10))
