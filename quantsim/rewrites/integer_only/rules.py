"""One table: op → how it is computed on integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantsim.graph.roles import KEEPS_GRID, WEIGHTS, op_of
from quantsim.kernels.int8_matmul import LARGEST_AFFINE_SUM, LARGEST_SUM, affine_matmul, int8_matmul
from quantsim.numerics.affine import quantize
from quantsim.numerics.dyadic import INT32_MAX, dyadic
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
from quantsim.quantizers.exact_linear import is_int8_weight
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.rewrites.integer_only.builder import Builder, unsupported
from quantsim.rewrites.integer_only.masks import add_mask, fill_mask
from quantsim.rewrites.integer_only.values import Channels, Choice, Constant, Floats, IntegerError, Ints, Value
from quantsim.rewrites.lower_int8.edges import LISTS

aten = torch.ops.aten
Rule = Callable[[Builder, fx.Node], Value]

SUM_BITS = NORM_IN_BITS
"""A sum (of embeddings, or a residual's) has as many bits as a norm takes."""
FACTOR_BITS = 16
FORCED = {
    "none": frozenset[str](),
    "gelu": frozenset({"gelu"}),
    "softmax": frozenset({"softmax"}),
    "layernorm": frozenset({"layer_norm"}),
    "nonlinear": frozenset({"gelu", "softmax", "layer_norm", "tanh"}),
}
"""``force_dequant`` → the ops that are computed in floating point between integers, as I-BERT's users know it."""


# ---- products ----


def embedding(b: Builder, node: fx.Node) -> Value:
    """Rows of integers: int8 where the quantizer has one scale of 8 bits or fewer, else int32 with 16 bits."""
    weight, ids = constant(b, node, 0), b.plain(node.args[1], node)  # type: ignore[arg-type]
    reader = next(iter(node.users), None)
    quantizer = quantizer_of(reader, b.source)
    if isinstance(quantizer, WeightQuantizer) and quantizer.spec.bits <= 8:
        params = quantizer.affine_params()
        q, dtype = quantize(weight, params), torch.int8 if params.quant_min < 0 else torch.uint8
        zero_point, scale = int(params.zero_point), float(params.scale)
        bound = max(abs(params.quant_min - zero_point), abs(params.quant_max - zero_point))
        rows = b.keep(q.to(dtype), f"{quantizer.name}.rows")
        return Ints(b.emit(aten.embedding.default, rows, ids), scale, bound, zero_point, dtype)
    if isinstance(quantizer, WeightQuantizer):
        weight = quantizer(weight)
    scale = b.scale_for(float(weight.abs().max()), FACTOR_BITS)
    q = (weight.double() / scale).round().to(torch.int32)
    return Ints(b.emit(aten.embedding.default, b.keep(q), ids), scale, int(q.abs().max()))


def linear(b: Builder, node: fx.Node) -> Value:
    """``q_x @ q_w.T`` in int32; scales, zero point and bias follow at the next rescale."""
    x = eight_bits(b, node, 0)
    source = node.args[WEIGHTS["linear"].index]
    quantizer = quantizer_of(source, b.source)
    if not isinstance(quantizer, WeightQuantizer):
        raise unsupported(node, "its weight has no quantizer; integer products need one: symmetric, 8 bits or fewer")
    if not is_int8_weight(quantizer.spec):
        raise unsupported(node, f"{quantizer.name} is {quantizer.spec}; an integer product needs symmetric weights of 8 bits or fewer")
    params = quantizer.affine_params()
    q = quantize(constant(b, node, WEIGHTS["linear"].index), params).to(torch.int8)  # [out, in]
    wide = q.double()
    scale = (params.scale.double() * x.scale).expand(len(q))
    bias = constant(b, node, 2).double() if len(node.args) > 2 and node.args[2] is not None else torch.zeros(len(q), dtype=torch.float64)
    most = 255 if x.dtype == torch.uint8 else 128
    bound = wide.abs().sum(1) * most
    if float(bound.max()) > INT32_MAX:
        raise unsupported(node, f"a sum over {q.shape[1]} products may overflow 32 bits")
    stored = b.emit(aten.t.default, b.keep(q, f"{quantizer.name}.rows"))  # [out, in] -> [in, out]
    product = b.emit(int8_matmul, x.node, stored, b.kernel)
    return Channels(product, scale, bias - x.zero_point * scale * wide.sum(1), bound)


def matmul(b: Builder, node: fx.Node) -> Value:
    """A product of two 8-bit edges, in int32."""
    left, right = eight_bits(b, node, 0), eight_bits(b, node, 1)
    length = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    plain = left.zero_point == right.zero_point == 0 and right.dtype == torch.int8
    if not isinstance(length, int):  # the number of keys
        length = LARGEST_SUM if plain else LARGEST_AFFINE_SUM
    bound = length * left.bound * right.bound
    if bound > INT32_MAX:
        raise unsupported(node, f"a sum over {length} products may overflow 32 bits")
    if plain:
        return Ints(b.emit(int8_matmul, left.node, right.node, b.kernel), left.scale * right.scale, bound)
    product = b.emit(affine_matmul, left.node, right.node, left.zero_point, right.zero_point, b.kernel)
    return Ints(product, left.scale * right.scale, bound)


# ---- nonlinear functions ----


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
    assert callable(node.target)
    return Floats(b.emit(node.target, x, *rest, **node.kwargs), largest * (1 + 2.0**-10))


# ---- sums and factors ----


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


# ---- what moves values, and masks ----


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


# ---- arguments ----


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


RULES: dict[str, Rule] = {
    "embedding": embedding,
    "linear": linear,
    "matmul": matmul,
    "layer_norm": layer_norm,
    "softmax": softmax,
    "gelu": gelu,
    "tanh": tanh,
    "relu": relu,
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "neg": neg,
    "cat": cat,
    "stack": cat,
    "concat": cat,
    "masked_fill": masked_fill,
    "where": where,
    "clamp": clamp,
    **dict.fromkeys(KEEPS_GRID | {"type_as"}, move),
}


def supported() -> Sequence[str]:
    return sorted(set(RULES) - KEEPS_GRID - LISTS)
