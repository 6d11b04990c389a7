"""The attention mask, clamped: −6 in place of the most negative number there is."""

from __future__ import annotations

import torch
from torch import fx

from quantsim.graph.roles import MASK_ADD, MASK_FILL, Roles

aten = torch.ops.aten


def clamp_mask(graph: fx.GraphModule, value: float) -> fx.GraphModule:
    """Let a masked score be ``score + value`` in every attention; in place, and returned.

    A mask that is added (``scores + mask``) becomes ``scores + max(mask, value)``, one that is subtracted
    ``scores - min(mask, -value)``. A mask that overwrites
    (``scores.masked_fill(hidden, -big)``) becomes ``scores + where(hidden, value, 0)``: with the large value both give
    the same softmax, so both get the same meaning here.

    Source: AIMET model zoo, BERT, which uses −6: an 8-bit grid over scores and mask keeps its steps for the scores.

    A window of attention or a causal order is a mask too. What is hidden keeps ``exp(value)`` of its weight, which adds up where
    hundreds of tokens are hidden: give a lower value there.

    Args:
        value: negative.
    """
    roles = Roles(graph)
    clamped: dict[tuple[fx.Node, tuple[float | None, ...]], fx.Node] = {}
    for node, role in roles.role.items():
        if role == MASK_ADD:
            index = roles.mask_operand(node)
            assert index is not None
            mask = node.args[index]
            assert isinstance(mask, fx.Node)
            ends = (value,) if roles.op[node] == "add" else (None, -value)
            if (mask, ends) not in clamped:
                with graph.graph.inserting_after(mask):
                    clamped[mask, ends] = graph.graph.call_function(aten.clamp.default, (mask, *ends))
                clamped[mask, ends].meta = dict(mask.meta)
            node.update_arg(index, clamped[mask, ends])
        elif role == MASK_FILL:
            _fill_to_add(graph, node, roles, value)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def _fill_to_add(graph: fx.GraphModule, node: fx.Node, roles: Roles, value: float) -> None:
    if roles.op[node] == "masked_fill":
        scores, hidden = node.args[0], node.args[1]
        branches = (value, 0.0)
    else:  # where(condition, a, b): the scores are the branch that something learned goes into
        hidden = node.args[0]
        learned = [isinstance(branch, fx.Node) and not roles.from_ids_alone(branch) for branch in node.args[1:3]]
        if learned == [True, True]:
            return  # a choice between two computed tensors is no mask
        scores = node.args[1] if learned[0] else node.args[2]
        branches = (0.0, value) if learned[0] else (value, 0.0)
    assert isinstance(scores, fx.Node)
    with graph.graph.inserting_before(node):
        mask = graph.graph.call_function(aten.where.Scalar, (hidden, *branches))
        mask = graph.graph.call_function(aten.to.dtype, (mask, scores.meta["val"].dtype))
        added = graph.graph.call_function(aten.add.Tensor, (scores, mask))
    for new in (mask.args[0], mask, added):
        assert isinstance(new, fx.Node)
        new.meta = dict(node.meta)
    node.replace_all_uses_with(added)
    graph.graph.erase_node(node)
