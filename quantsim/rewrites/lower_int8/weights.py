"""Quantized weights → int8 tables of embeddings, and constants; linears are in ``products``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from quantsim.graph.roles import WEIGHTS, op_of
from quantsim.kernels.edges import COMPUTES, Grid, from_integers, rows_from_integers
from quantsim.numerics.affine import quantize
from quantsim.quantizers.exact_linear import is_int8_weight
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.rewrites.insert_quantizers import evaluate
from quantsim.rewrites.lower_int8.edges import dequantize
from quantsim.rewrites.lower_int8.whole import put

ROOM, ROWS = "integers", "rows"


def freeze_weights(graph: fx.GraphModule) -> None:
    """Embeddings of at most 8 bits keep int8 rows, read as they are looked up; the rest becomes constants.

    The weights of linears that get an integer product are left for ``linears_to_integers``.
    """
    for node in list(graph.graph.nodes):
        quantizer = quantizer_of(node, graph)
        if not isinstance(quantizer, WeightQuantizer):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if op_of(source, graph) == "embedding":  # quantized behind the look-up
            node.replace_all_uses_with(_frozen_look_up(graph, source, quantizer))
            continue
        for user in list(node.users):
            if op_of(user, graph) == "embedding" and user.args[0] is node:
                user.update_arg(0, source)
                user.replace_all_uses_with(_frozen_look_up(graph, user, quantizer), delete_user_cb=_is_outside(user))
            elif not takes_int8(user, node, quantizer, graph):
                value = quantizer(evaluate(graph, source)).detach().clone()
                user.replace_input_with(node, constant(graph, user, f"{ROOM}.{quantizer.name}.values", value))


def takes_int8(user: fx.Node, weight: fx.Node, quantizer: FakeQuantizer, graph: fx.GraphModule) -> bool:
    """A linear whose weight an integer product takes."""
    reads_it = op_of(user, graph) == "linear" and user.args[WEIGHTS["linear"].index] is weight and user.args[0] is not weight
    return reads_it and is_int8_weight(quantizer.spec)


def _frozen_look_up(graph: fx.GraphModule, look_up: fx.Node, quantizer: FakeQuantizer) -> fx.Node:
    """The node that gives the quantized rows of a look-up: from int8 rows with one scale or one each, or from float32 values."""
    at, spec, params = WEIGHTS["embedding"].index, quantizer.spec, quantizer.affine_params()
    weight, ids = look_up.args[at], look_up.args[1]
    assert isinstance(weight, fx.Node)
    values, path = evaluate(graph, weight), f"{ROOM}.{quantizer.name}"
    own_scales = params.scale.numel() > 1
    if spec.bits > 8 or (own_scales and not (spec.symmetric and spec.axis == 0)):
        look_up.update_arg(at, constant(graph, look_up, f"{path}.values", quantizer(values.detach().clone()).detach()))
        return look_up
    rows = quantize(values, params).to(torch.int8 if spec.symmetric else torch.uint8)
    look_up.update_arg(at, constant(graph, look_up, f"{path}.{ROWS}", rows))
    look_up.meta = {COMPUTES: look_up.meta.get(COMPUTES, quantizer.name)}
    if not own_scales:
        with graph.graph.inserting_after(look_up):
            return dequantize(graph, look_up, Grid.of(params))
    scales = constant(graph, look_up, f"{path}.scales", params.scale.detach().clone())
    with graph.graph.inserting_after(look_up):
        of_rows = graph.graph.call_function(rows_from_integers, (look_up, scales, ids))
    of_rows.meta = {}
    return of_rows


def _is_outside(node: fx.Node) -> Callable[[fx.Node], bool]:
    """Says of a user that it doesn't read the node in order to dequantize it."""
    return lambda user: user.target not in (from_integers, rows_from_integers)


def constant(graph: fx.GraphModule, before: fx.Node, path: str, value: Tensor) -> fx.Node:
    """A node that reads ``value``, kept at ``path``."""
    put(graph, path, value)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(path)
    node.meta = {}
    return node
