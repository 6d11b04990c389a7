"""A calibrated simulation → a graph in which every tensor between the embedding look-ups and the outputs holds integers.

Each node of the simulation becomes a value (``values``): integers with a scale and a bound, by the one table of ``rules``. Quantizers
become rescales. Products are exact in int32, rescales dyadic, nonlinear functions polynomials (``quantsim.numerics.polynomial``);
masks are booleans (``masks``). Functions of an 8-bit edge become tables (``tables``). Outputs are dequantized at the very end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from quantsim.graph.roles import is_float, op_of, resolve
from quantsim.graph.trace import whole_numbers
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer
from quantsim.quantizers.in_graph import not_finite, quantizer_of
from quantsim.rewrites.integer_only.builder import Builder, Tables, unsupported
from quantsim.rewrites.integer_only.masks import is_mapped, mapped, of_ids
from quantsim.rewrites.integer_only.rules import FORCED, RULES, supported
from quantsim.rewrites.integer_only.tables import functions_to_tables
from quantsim.rewrites.integer_only.values import Constant, IntegerError, Ints, Value

__all__ = ["ForceDequant", "IntegerError", "integer_only"]

ForceDequant = Literal["none", "gelu", "softmax", "layernorm", "nonlinear"]
SIZES = frozenset({"sym_size", "getattr", "size", "sym_numel", "dim"})
CREATES = frozenset({"zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_full", "zeros_like", "full_like"})


@dataclass(frozen=True)
class Converted:
    """The integer graph, and which of its nodes hold the values of which node of the simulation (by name): edges, and outputs."""

    graph: fx.GraphModule
    edges: Mapping[str, Ints]
    outputs: Mapping[str, fx.Node]


def integer_only(
    graph: fx.GraphModule, force_dequant: ForceDequant = "none", *, kernel: bool = True, names: Mapping[str, str] | None = None
) -> fx.GraphModule:
    """A new graph for inference, on integers alone; the simulated one stays as it is.

    Args:
        graph: simulated and calibrated.
        force_dequant: compute these functions in floating point between integers: I-BERT's switch, to find what costs accuracy.
        kernel: products run on oneDNN's kernel; without, in float32, exact (``int8_matmul``).
        names: node's name → edge that it computes, for reports.

    Raises:
        IntegerError: a quantizer that is not calibrated, an edge without a scale, a floating-point input, an op that has no integer
            form, weights that are not finite, or values that 32 bits cannot hold.
    """
    return convert(graph, force_dequant, kernel, names=names).graph


@torch.no_grad()
def convert(
    graph: fx.GraphModule,
    force_dequant: str,
    kernel: bool,
    tables: bool = True,
    names: Mapping[str, str] | None = None,
    kept: Tables | None = None,
) -> Converted:
    """:func:`integer_only`, with what became of every edge; ``kept`` is filled with large constants, and read at the next call."""
    if force_dequant not in FORCED:
        raise IntegerError(f"force_dequant: {force_dequant!r}; expected one of {', '.join(FORCED)}")
    if wrong := not_finite(graph):
        raise IntegerError(f"{wrong}; integers have no NaN. Load the weights of before they diverged")
    b = Builder(graph, FORCED[force_dequant], kernel, kept)
    for node in graph.graph.nodes:
        b.computes = (names or {}).get(node.name, _edge(b, node))
        b.value[node] = _value(b, node)
    integers = fx.GraphModule(b.root, b.graph, f"Integer{type(graph).__name__}")
    if tables:
        functions_to_tables(integers)
    integers.graph.eliminate_dead_code()
    integers.graph.lint()
    integers.recompile()
    alive = set(integers.graph.nodes)
    edges = {n.name: v for n, v in b.value.items() if isinstance(v, Ints) and v.node in alive and not _is_raw(b, n)}
    return Converted(integers.eval(), edges, {n.name: made for n, made in b.outputs.items()})


def _is_raw(b: Builder, node: fx.Node) -> bool:
    """Rows before their quantizer: in the integer graph they are looked up quantized."""
    return any(isinstance(quantizer_of(user, b.source), WeightQuantizer) for user in node.users)


def _edge(b: Builder, node: fx.Node) -> str:
    """A quantizer computes the edge of its name."""
    quantizer = quantizer_of(node, b.source)
    return quantizer.name if quantizer is not None else node.name


def _value(b: Builder, node: fx.Node) -> Value:
    if node.op == "placeholder":
        if is_float(node):
            raise unsupported(node, "a floating-point input; an integer graph begins at embedding look-ups")
        given = b.graph.node_copy(node)
        return b.emit(whole_numbers, given, node.name)
    if node.op == "get_attr":
        x = resolve(b.source, str(node.target))
        if not isinstance(x, Tensor):
            raise unsupported(node, "a block that runs apart (torch.no_grad or autocast inside the model) has no integer form")
        return Constant(x.detach()) if x.is_floating_point() else b.copy(node)
    if node.op == "call_module" and op_of(node, b.source) not in RULES:
        return _module(b, node)
    if node.op == "output":
        made: fx.Node = b.graph.output(fx.map_arg(node.args[0], lambda n: _finished(b, n, node)))
        return made
    return _function(b, node)


def _finished(b: Builder, node: fx.Node, reader: fx.Node) -> fx.Node:
    """An output of the model, in floating point where the model's is."""
    value = b.value[node]
    if isinstance(value, fx.Node):
        return value
    if node not in b.outputs:
        b.outputs[node] = b.dequantized(value, reader)
    return b.outputs[node]


def _module(b: Builder, node: fx.Node) -> Value:
    module, x = b.source.get_submodule(str(node.target)), b.value[node.args[0]]  # type: ignore[index]
    if isinstance(module, nn.Dropout):
        return x
    if not isinstance(module, FakeQuantizer):
        raise unsupported(node, f"a {type(module).__name__}; only quantizers and dropout are expected here")
    if not module.calibrated:
        raise IntegerError(f"{module.name}: its quantizer is {module.state.name.lower()}; call compute_encodings, or load ranges, before")
    if isinstance(module, WeightQuantizer):
        if not isinstance(x, Constant):
            return x  # rows of an embedding: the look-up took the quantizer's scale
        only_products = all(op_of(user, b.source) == "linear" and user.args[0] is not node for user in node.users)
        return x if only_products else Constant(module(x.value).detach())
    spec, params = module.spec, module.affine_params()
    if spec.follow == "dynamic":
        raise IntegerError(
            f"{module.name}: its range is each tensor's own (dynamic); an edge of the integer graph has a scale that is known"
        )
    if spec.axis is not None:
        raise IntegerError(f"{module.name}: {spec}; an edge of the integer graph has one scale")
    dtype = torch.int32 if spec.bits > 8 else torch.int8 if spec.symmetric else torch.uint8
    return b.quantized(x, float(params.scale), int(params.zero_point), params.quant_min, params.quant_max, dtype, node)


def _function(b: Builder, node: fx.Node) -> Value:
    op, inputs = op_of(node, b.source), [b.value[n] for n in node.all_input_nodes]
    if isinstance(node.target, type):  # the model's output
        return b.emit(node.target, *node.args, **fx.map_arg(dict(node.kwargs), lambda n: _finished(b, n, node)))
    if op in CREATES and is_float(node):
        return _created(node)
    if all(isinstance(v, fx.Node) for v in inputs):
        if not is_float(node):
            return b.copy(node)
        made = of_ids(b, node, op)
        if made is not None:
            return made
    elif op in SIZES:
        holder = inputs[0]
        assert not isinstance(holder, (fx.Node, Constant))
        assert callable(node.target)
        return b.emit(node.target, holder.node, *node.args[1:])
    if inputs and all(isinstance(v, Constant) for v in inputs) and op != "where":
        return _from_parameters(b, node)
    if is_mapped(b, node, op):
        return mapped(b, node)
    rule = RULES.get(op)
    if rule is None:
        raise unsupported(node, f"{op} has no integer form; there are {', '.join(supported())}, and ops that move values")
    return rule(b, node)


def _created(node: fx.Node) -> Constant:
    value: Any = node.meta["val"]
    if value.ndim and node.target is not torch.ops.aten.zeros_like.default:
        raise unsupported(node, "a floating-point tensor that is made up; only a fixed number")
    fill = {"full": 1, "scalar_tensor": 0, "new_full": 2, "full_like": 1}.get(node.target._schema.name.split("::")[1])  # type: ignore[union-attr]
    number = node.args[fill] if fill is not None else float(node.target._schema.name.endswith("ones"))  # type: ignore[union-attr]
    return Constant(torch.tensor(float(number), dtype=torch.float64))  # type: ignore[arg-type]


def _from_parameters(b: Builder, node: fx.Node) -> Value:
    """What depends on parameters alone is worked out now."""

    def value(n: fx.Node) -> Tensor:
        known = b.value[n]
        assert isinstance(known, Constant)
        return known.value

    assert callable(node.target)
    result = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    if not isinstance(result, Tensor):
        raise unsupported(node, "computes no tensor from parameters")
    return Constant(result.detach())
