"""Ops inside ``no_grad`` and ``autocast`` are ops of the graph, with their values, quantizers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantsim import QuantConfig, QuantSim, trace


class Regions(nn.Module):
    """A linear in a region that ``how`` names, between two others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.how = how
        self.before, self.inside, self.after = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.before(x)
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.inside(h) * torch.tensor([2.0])
        elif self.how == "nested":
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                h = self.inside(h.float())
        else:
            with torch.autocast("cpu", enabled=False):
                h = self.inside(h.float())
        return {"logits": self.after(h)}


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 5, 8)}


@pytest.mark.parametrize("how", ["no_grad", "autocast", "nested"])
def test_every_op_is_seen_and_gradients_are_the_models(how: str) -> None:
    model = Regions(how).eval()
    graph = trace(model, batch())
    linears = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(linears) == 3
    other = {"x": torch.randn(2, 7, 8)}
    gradients = []
    for module in (model, graph):
        model.zero_grad()
        module(**other)["logits"].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert ("inside.weight" in gradients[0]) == (how == "autocast")
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
    placed = [p.name for p in QuantSim(model, QuantConfig(), batch()).placements if p.spec]
    assert {"inside.weight", "inside.output"} <= set(placed)
