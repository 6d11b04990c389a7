"""Forward and backward in integers: every listed op of a traced graph becomes its integer form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from quantsim.rewrites.integer_training.config import IntegerConfig
from quantsim.rewrites.integer_training.decide import Decision, decide, decision_table
from quantsim.rewrites.integer_training.op import IntegerOp

__all__ = ["Decision", "IntegerConfig", "IntegerOp", "decide", "decision_table", "integer_training"]

ROOM = "integer_ops"
KEY = f"{ROOM}.random_key"


class RandomKey(nn.Module):
    """One number a forward, which all random numbers of that forward and its backward follow from.

    It is drawn from torch's default generator, so ``torch.manual_seed`` decides it as it decides dropout; ``None`` in eval mode.
    """

    def forward(self) -> int | None:
        return int(torch.randint(2**63 - 1, ())) if self.training else None


def integer_training(graph: fx.GraphModule, decisions: Sequence[Decision], config: IntegerConfig) -> fx.GraphModule:
    """Replace each op that was decided to be computed in integers by its integer form; in place, and returned.

    Weights stay the parameters that they are, in float: they are mapped anew in each forward, and their gradients are float32, so that
    any optimizer updates them.
    """
    first = next(iter(graph.graph.find_nodes(op="placeholder")))
    graph.add_submodule(KEY, RandomKey().train(graph.training))
    with graph.graph.inserting_before(first):
        key = graph.graph.call_module(KEY)
    for number, decision in enumerate(decisions):
        if decision.form is None:
            continue
        node, path = decision.node, f"{ROOM}.{decision.name}"
        op = IntegerOp(decision.form.function, decision.name, number, config)
        graph.add_submodule(path, op.train(graph.training))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(path, (key, *node.args[: decision.form.takes]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph
