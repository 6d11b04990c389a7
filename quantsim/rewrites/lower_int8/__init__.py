"""A calibrated simulation → a graph that computes on the integers it simulates.

The order of the work is the order of the files: edges become integers in storage, linears and matmuls products of integers, requantization
and GELU go into the products, products of the same edge become one, functions of an 8-bit edge become tables, and attention
without quantizers in it one kernel. What has no integer kernel stays as it was simulated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from quantsim.graph.place import FROM_IDS, Placement
from quantsim.quantizers.in_graph import not_finite
from quantsim.rewrites.lower_int8.attention import fuse_attention
from quantsim.rewrites.lower_int8.attention_int8 import attention_to_integers
from quantsim.rewrites.lower_int8.edges import edges_to_integers, forget_unread_integers, sink_dequantize
from quantsim.rewrites.lower_int8.matmuls import matmuls_to_integers
from quantsim.rewrites.lower_int8.products import linears_to_integers, merge_products, requantize_in_products
from quantsim.rewrites.lower_int8.sums import sums_to_functions
from quantsim.rewrites.lower_int8.tables import functions_to_tables
from quantsim.rewrites.lower_int8.weights import freeze_weights
from quantsim.rewrites.lower_int8.whole import LoweringError, copy_for_inference, finish

__all__ = ["LoweringError", "lower_int8"]


@torch.no_grad()
def lower_int8(graph: fx.GraphModule, placements: Sequence[Placement], packs: bool = True, exact: bool = False) -> fx.GraphModule:
    """A new graph for inference, on integers; the simulated one stays as it is.

    Nodes that make a quantized edge carry its name as ``meta["edge"]`` and its grid as ``meta["grid"]``.

    Args:
        graph: simulated and calibrated.
        placements: of its quantizers.
        packs: products run on oneDNN's kernels; without, in float32 with the same integers.
        exact: every value is the simulation's to the bit: products give float32, which is requantized as the simulation does it (a
            kernel multiplies by ``1 / scale`` where that divides), attention keeps its ops, and norms sum in float64.

    Raises:
        LoweringError: a quantizer that is not calibrated, a weight or range that is not finite.
    """
    if wrong := not_finite(graph):
        raise LoweringError(f"{wrong}; integers have no NaN. Load the weights of before they diverged")
    names = {p.node.name: p.name for p in placements if p.role != "weight" and p.reason != FROM_IDS}
    lowered = copy_for_inference(graph, names)
    edges_to_integers(lowered)
    freeze_weights(lowered)
    sink_dequantize(lowered)
    linears_to_integers(lowered, packs)
    matmuls_to_integers(lowered)
    if not exact:
        requantize_in_products(lowered)
    merge_products(lowered)
    functions_to_tables(lowered)
    if not exact:
        if packs:
            attention_to_integers(lowered)
        fuse_attention(lowered)
    sums_to_functions(lowered, exact)
    forget_unread_integers(lowered)
    return finish(lowered)
