"""Functions of one 8-bit edge → tables of 256 entries, worked out with the integer ops that they replace: equal to them, always."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quantsim.kernels.edges import COMPUTES, look_up
from quantsim.numerics.dyadic import rescale, rescale_channels
from quantsim.numerics.polynomial import i_gelu, i_tanh
from quantsim.rewrites.lower_int8.weights import ROOM
from quantsim.rewrites.lower_int8.whole import put

aten = torch.ops.aten
STEPS = frozenset({rescale, i_gelu, i_tanh, aten.to.dtype, aten.sub.Tensor, aten.neg.default, aten.clamp.default})
FUNCTIONS = frozenset({i_gelu, i_tanh})
EIGHT_BITS = {torch.int8: -128, torch.uint8: 0}


def functions_to_tables(graph: fx.GraphModule) -> None:
    """A chain of elementwise ops with a polynomial in it, from 8 bits to 8 bits, becomes one look-up."""
    for last in list(graph.graph.find_nodes(op="call_function", target=rescale)):
        chain = _chain(last)
        if _gives(last) not in EIGHT_BITS or not any(node.target in FUNCTIONS for node in chain):
            continue
        source = chain[0].args[0]
        assert isinstance(source, fx.Node)
        given = _gives(source)
        if given not in EIGHT_BITS:
            continue
        least = EIGHT_BITS[given]
        q: Tensor = torch.arange(least, least + 256).to(given)
        for node in chain:
            assert callable(node.target)
            q = node.target(q, *node.args[1:], **node.kwargs)
        path = f"{ROOM}.tables.{last.name}"
        put(graph, path, q)
        with graph.graph.inserting_before(last):
            new = graph.graph.call_function(look_up, (source, graph.graph.get_attr(path), least))
        new.meta = {COMPUTES: chain[-2].meta[COMPUTES]}
        last.replace_all_uses_with(new)
        graph.graph.erase_node(last)


def _gives(node: fx.Node) -> torch.dtype | None:
    """The type of an edge that was rescaled."""
    dtype = node.kwargs.get("dtype") if node.target is rescale else node.args[-1] if node.target is rescale_channels else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _chain(last: fx.Node) -> list[fx.Node]:
    """The elementwise ops that end in ``last``, in order, each read by the next alone."""
    chain = [last]
    while True:
        before = chain[0].args[0]
        if not isinstance(before, fx.Node) or before.target not in STEPS or len(before.users) > 1:
            return chain
        if _gives(before) in EIGHT_BITS:
            return chain
        chain.insert(0, before)
