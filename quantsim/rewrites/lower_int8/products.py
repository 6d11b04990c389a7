"""Linears → products of integers, with what comes after a product inside it, and one product for layers that read the same edge."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from quantsim.graph.roles import WEIGHTS, op_of
from quantsim.kernels.edges import COMPUTES, EDGE, GRID, Grid, from_integers, from_own_range, to_integers
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.numerics.affine import quantize
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.rewrites.insert_quantizers import evaluate
from quantsim.rewrites.lower_int8.weights import ROOM, constant
from quantsim.rewrites.lower_int8.whole import put_beside, sole_user

aten = torch.ops.aten


def linears_to_integers(graph: fx.GraphModule, packs: bool) -> None:
    """``linear(from_integers(q), quantized weight, bias)`` → :class:`Int8Linear` on ``q``; where floats come in, a constant weight.

    Where each tensor has a range of its own, scale and zero point go into the product beside the integers.

    A layer that is called again (ALBERT's) gets a product a call, for each call has edges of its own; they share the weight.
    """
    weights: dict[str, Tensor] = {}
    for node in list(graph.graph.nodes):
        if op_of(node, graph) != "linear":
            continue
        x, weight = node.args[0], node.args[WEIGHTS["linear"].index]
        quantizer = quantizer_of(weight, graph)
        if not isinstance(quantizer, WeightQuantizer):
            continue
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        value = evaluate(graph, weight.args[0])  # type: ignore[arg-type]
        if x.target not in (from_integers, from_own_range):
            node.replace_input_with(weight, constant(graph, node, f"{ROOM}.{quantizer.name}.values", quantizer(value).detach().clone()))
            continue
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        params = quantizer.affine_params()
        product = Int8Linear(
            quantize(value, params).to(torch.int8),
            params.scale,
            evaluate(graph, bias) if isinstance(bias, fx.Node) else None,
            x.meta[GRID],
            packs,
            quantizer.name,
        )
        product.weight = weights.setdefault(quantizer.name, product.weight)
        _replace(graph, node, product, quantizer.name, x.args[:1] if x.target is from_integers else x.args)


def _replace(graph: fx.GraphModule, node: fx.Node, product: Int8Linear, name: str, stored: tuple[Any, ...]) -> fx.Node:
    """Call the product on integers, or on integers with a scale and a zero point of their own."""
    path = put_beside(graph, f"{ROOM}.{name}.product", product)
    with graph.graph.inserting_before(node):
        new = graph.graph.call_module(path, stored)
    new.meta = {COMPUTES: node.meta.get(COMPUTES, name)}
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def product_of(node: fx.Node, graph: fx.GraphModule) -> Int8Linear | None:
    """The product that the node calls, if it calls one."""
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Int8Linear) else None


def requantize_in_products(graph: fx.GraphModule) -> None:
    """GELU, ReLU and ``to_integers`` behind a product go into it, where nothing else reads what is between."""
    for node in list(graph.graph.nodes):
        product = product_of(node, graph)
        if product is None:
            continue
        user = sole_user(node)
        if user is not None and op_of(user, graph) in ("gelu", "relu"):
            product.post_op = op_of(user, graph)  # type: ignore[assignment]
            product.algorithm = str(user.kwargs.get("approximate", "none"))
            _skip(graph, user, node)
            user = sole_user(node)
        if user is not None and user.target is to_integers and _is_whole(user.meta[GRID]):
            product.give([replace(product.outputs[0], grid=user.meta[GRID])])
            _skip(graph, user, node)


def _is_whole(grid: Grid) -> bool:
    """The grid's ends are the stored type's: the kernel saturates there."""
    return grid.quant_max - grid.quant_min == 255


def _skip(graph: fx.GraphModule, after: fx.Node, node: fx.Node) -> None:
    """``node`` computes what ``after`` did."""
    node.meta = node.meta | {k: after.meta[k] for k in (EDGE, GRID, COMPUTES) if k in after.meta}
    after.replace_all_uses_with(node)
    graph.graph.erase_node(after)


class _Together(NamedTuple):
    """Products that can be one: they read the same integers, have no post-op, and all give floats or all integers of one type."""

    stored: fx.Node
    dtype: torch.dtype
    post_op: str


def merge_products(graph: fx.GraphModule) -> None:
    """Products of the same edge become one, split afterwards: one pass over the edge, and one large product in place of small ones."""
    together: dict[_Together, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        product = product_of(node, graph)
        if product is not None and product.post_op == "none":
            grid = product.outputs[0].grid
            key = _Together(node.args[0], grid.dtype if grid else torch.float32, product.post_op)
            together.setdefault(key, []).append(node)
    weights: dict[tuple[str, ...], Tensor] = {}
    for nodes in together.values():
        if len(nodes) > 1:
            _merge(graph, nodes, weights)


def _merge(graph: fx.GraphModule, nodes: Sequence[fx.Node], weights: dict[tuple[str, ...], Tensor]) -> None:
    """One product in place of ``nodes``; of the same weights as one before (in ``weights``), it shares theirs."""
    parts = [product_of(node, graph) for node in nodes]
    products = [part for part in parts if part is not None]
    first = products[0]
    no_bias = all(p.bias is None for p in products)
    merged = Int8Linear(
        torch.cat([p.integers() for p in products]),
        torch.cat([p.weight_scale for p in products]),
        None if no_bias else torch.cat([torch.zeros_like(p.weight_scale) if p.bias is None else p.bias for p in products]),
        first.grid,
        first.packs,
    )
    merged.give([p.outputs[0] for p in products])
    merged.weight = weights.setdefault(tuple(out.weight for out in merged.outputs), merged.weight)
    path = put_beside(graph, f"{nodes[0].target}_and_{len(nodes) - 1}_more", merged)
    with graph.graph.inserting_before(nodes[0]):
        whole = graph.graph.call_module(path, nodes[0].args)
        parts_node = graph.graph.call_function(aten.split_with_sizes.default, (whole, [p.out_features for p in products], -1))
        pieces = [graph.graph.call_function(operator.getitem, (parts_node, i)) for i in range(len(nodes))]
    for node, piece in zip(nodes, pieces, strict=True):
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
        graph.graph.erase_node(node)
