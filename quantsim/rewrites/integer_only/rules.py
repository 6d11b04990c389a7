"""One table: op → how it is computed on integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from quantsim.graph.roles import KEEPS_GRID
from quantsim.rewrites.integer_only.builder import Builder
from quantsim.rewrites.integer_only.functions import gelu, layer_norm, relu, softmax, tanh
from quantsim.rewrites.integer_only.moves import clamp, masked_fill, move, where
from quantsim.rewrites.integer_only.products import embedding, linear, matmul
from quantsim.rewrites.integer_only.sums import add, cat, div, mul, neg, sub
from quantsim.rewrites.integer_only.values import Value
from quantsim.rewrites.lower_int8.edges import LISTS

Rule = Callable[[Builder, fx.Node], Value]

FORCED = {
    "none": frozenset[str](),
    "gelu": frozenset({"gelu"}),
    "softmax": frozenset({"softmax"}),
    "layernorm": frozenset({"layer_norm"}),
    "nonlinear": frozenset({"gelu", "softmax", "layer_norm", "tanh"}),
}
"""``force_dequant`` → the ops that are computed in floating point between integers, as I-BERT's users know it."""

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
