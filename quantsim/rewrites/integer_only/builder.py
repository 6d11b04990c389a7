"""The graph under construction: nodes are emitted, constants kept, and values brought to the scale that an op needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantsim.graph.roles import resolve
from quantsim.kernels.edges import COMPUTES, from_integers, to_integers
from quantsim.numerics.dyadic import INT32_MAX, OverflowRisk, channel_rescale, dyadic, rescale, rescale_channels
from quantsim.numerics.polynomial import NORM_IN_BITS
from quantsim.quantizers.fake_quantizer import WeightQuantizer, fingerprint
from quantsim.rewrites.integer_only.values import Channels, Choice, Constant, Floats, IntegerError, Ints, Value
from quantsim.rewrites.lower_int8.weights import ROOM
from quantsim.rewrites.lower_int8.whole import put

SUM_BITS = NORM_IN_BITS
"""A sum (of embeddings, or a residual's) has as many bits as a norm takes."""
FACTOR_BITS = 16
"""A factor that is computed, and rows that have no quantizer."""


Tables = dict[str, tuple[object, Tensor]]
"""Quantizer's name → what its constant was worked out from, and the constant."""


class Builder:
    """Turns the nodes of a simulation, in order, into nodes of an integer graph.

    Attributes:
        source: the simulation's graph.
        value: what each of its nodes became.
        forced: ops that are computed in floating point.
        outputs: node of the simulation that the model gives → its dequantized form.
        kernel: products run on oneDNN's kernel.
        computes: the edge that is being converted, for reports.
        tables: what is kept from one building to the next.
    """

    def __init__(self, source: fx.GraphModule, forced: frozenset[str], kernel: bool, tables: Tables | None = None) -> None:
        self.source, self.forced, self.kernel = source, forced, kernel
        self.graph, self.root = fx.Graph(), nn.Module()
        self.value: dict[fx.Node, Value] = {}
        self.outputs: dict[fx.Node, fx.Node] = {}
        self.computes = ""
        self.tables: Tables = {} if tables is None else tables
        self._constants: dict[str, fx.Node] = {}
        self._count = 0

    # ---- nodes ----

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        node.meta = {COMPUTES: self.computes}
        return node

    def keep(self, x: Tensor, name: str | None = None) -> fx.Node:
        """A node that reads ``x``, kept as a buffer of the integer graph; a named one is kept once."""
        if name is not None and name in self._constants:
            return self._constants[name]
        path = f"{ROOM}.{name or f'constant_{self._count}'}"
        self._count += name is None
        put(self.root, path, x)
        node = self.graph.get_attr(path)
        if name is not None:
            self._constants[name] = node
        return node

    def worked_out(self, quantizer: WeightQuantizer, weight: Tensor, work_out: Callable[[], Tensor]) -> Tensor:
        """A large constant; the one before where neither the weight nor its range has changed since."""
        key = tuple(fingerprint(x) for x in (weight, *quantizer.range_tensors().values()))
        if self.tables.get(quantizer.name, ((), None))[0] != key:
            self.tables[quantizer.name] = key, work_out()
        return self.tables[quantizer.name][1]

    def copy(self, node: fx.Node) -> fx.Node:
        """The same node on plain nodes, with what it reads of the source kept as buffers."""
        if node.op == "get_attr":
            x = resolve(self.source, str(node.target))
            assert isinstance(x, Tensor)
            return self.keep(x.detach().clone())
        return self.graph.node_copy(node, lambda n: self.plain(n, node))

    def plain(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        value = self.value[node]
        if not isinstance(value, fx.Node):
            raise unsupported(reader, f"it reads {node.name}, which is computed, as if it were an id or a size")
        return value

    # ---- values ----

    def signed(self, x: Ints) -> fx.Node:
        """``q - zero_point`` as int32."""
        node = x.node if x.dtype == torch.int32 else self.emit(torch.ops.aten.to.dtype, x.node, torch.int32)
        return self.emit(torch.ops.aten.sub.Tensor, node, x.zero_point) if x.zero_point else node

    def largest(self, value: Value) -> float:
        """A bound on ``|x|``."""
        if isinstance(value, Ints):
            return value.bound * abs(value.scale)
        if isinstance(value, Constant):
            return float(value.value.abs().max())
        assert isinstance(value, (Channels, Floats))
        return value.largest

    def ints(self, value: Value, bits: int, reader: fx.Node) -> Ints:
        """The value as int32 with zero point 0 and ``|q| < 2**(bits - 1)``: as it is where it fits, else at the finest scale that does."""
        if isinstance(value, Ints) and value.bound < 2 ** (bits - 1):
            return Ints(self.signed(value), value.scale, value.bound)
        return self.at(value, self.scale_for(self.largest(self.known(value, reader)), bits), reader, 2 ** (bits - 1) - 1)

    def scale_for(self, largest: float, bits: int) -> float:
        """The finest scale at which values up to ``largest``, rounded with any multiplier, have ``bits`` bits, sign included."""
        return largest * (1 + 2.0**-10) / (2 ** (bits - 1) - 8) if largest > 0 else 1.0

    def known(self, value: Value, reader: fx.Node) -> Value:
        if isinstance(value, (Choice, fx.Node)):
            raise unsupported(reader, "a number that was made from ids alone is used in arithmetic (masks may be added or filled in)")
        return value

    def at(self, value: Value, scale: float, reader: fx.Node, limit: int = INT32_MAX) -> Ints:
        """The value as int32 at this very scale, clamped to ``±limit`` where it can be larger."""
        bound = math.ceil(self.largest(self.known(value, reader)) / scale * (1 + 2.0**-11)) + 1
        if bound > limit == INT32_MAX:
            raise IntegerError(f"{reader.name}: values up to {self.largest(value):.4g} need more than 32 bits at scale {scale:.4g}")
        limit = min(limit, bound)
        return self.quantized(value, scale, 0, -limit, limit, torch.int32, reader)

    def quantized(self, value: Value, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, reader: fx.Node) -> Ints:
        """``clamp(round(x / scale) + zero_point, low, high)`` as ``dtype``: one rescale, whatever the value is."""
        try:
            node = self._rescaled(self.known(value, reader), scale, zero_point, low, high, dtype)
        except OverflowRisk as error:
            raise IntegerError(f"{reader.name}: cannot be brought to scale {scale:.4g}: {error}") from error
        return Ints(node, scale, max(abs(low - zero_point), abs(high - zero_point)), zero_point, dtype)

    def _rescaled(self, value: Value, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> fx.Node:
        if isinstance(value, Ints):
            signed, ends = self.signed(value), (low - zero_point, high - zero_point)
            if value.scale < 0:
                signed = self.emit(torch.ops.aten.neg.default, signed)
            bound, reach = value.bound, max(map(abs, ends))
            ratio = min(abs(value.scale) / scale, 2.0 * (reach + 1))  # at a larger one, every integer but 0 is clamped just the same
            if bound * ratio >= 2**31:  # what is clamped afterwards anyway need not be multiplied
                bound = min(bound, math.ceil(reach / ratio) + 1)
                signed = self.emit(torch.ops.aten.clamp.default, signed, -bound, bound)
            numbers = dyadic(ratio, bound, *ends).numbers
            return self.emit(rescale, signed, *numbers, zero_point=zero_point, dtype=dtype)
        if isinstance(value, Channels):
            channels = channel_rescale(value.scale / scale, value.offset / scale + zero_point, value.bound)
            m, b = self.keep(channels.multiplier), self.keep(channels.offset)
            return self.emit(rescale_channels, value.node, m, b, channels.shift, low, high, dtype)
        if isinstance(value, Constant):
            q = (value.value.double() / scale).round() + zero_point
            return self.keep(q.clamp(low, high).to(dtype))
        assert isinstance(value, Floats)
        return self.emit(_wide_to_integers if dtype == torch.int32 else to_integers, value.node, scale, zero_point, low, high)

    def dequantized(self, value: Value, reader: fx.Node) -> fx.Node:
        """Back to float32: at the graph's end, and before an op that is forced to floating point."""
        if isinstance(value, Floats):
            return value.node
        x = self.ints(value, 31, reader)
        return self.emit(from_integers, x.node, x.scale, 0)


def _wide_to_integers(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """``to_integers`` for results of more than 8 bits; in float64, which holds 32-bit integers."""
    return (x.double() / scale).round().add_(zero_point).clamp_(low, high).to(torch.int32)


def unsupported(node: fx.Node, why: str) -> IntegerError:
    return IntegerError(f"{node.name} ({node.target}): {why}")
