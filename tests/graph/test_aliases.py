"""Writes in place become ops that write nowhere, unless the write is seen elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantsim import QuantConfig, QuantSim, trace


class Writes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.how = how
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(getattr(self, self.how)(self.first(x)))}

    def sum_in_place(self, h: Tensor) -> Tensor:
        h += 1
        return h

    def through_a_view(self, h: Tensor) -> Tensor:
        heads = h.view(h.shape[0], h.shape[1], 2, 4).transpose(1, 2)
        heads /= 3
        return heads.transpose(1, 2).reshape(h.shape)

    def name_kept(self, h: Tensor) -> Tensor:
        other = h
        h.mul_(2)
        return other + 1

    def into_a_slice(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 0] += 5
        return h

    def seen_through_a_view(self, h: Tensor) -> Tensor:
        view = h.view(-1, 8)
        h.add_(1)
        return view.view(h.shape)


OUT_OF_PLACE = ["sum_in_place", "through_a_view", "name_kept"]
SEEN = ["into_a_slice", "seen_through_a_view"]


def writing_ops(graph: torch.fx.GraphModule) -> list[str]:
    schemas = [node.target._schema for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [s.name for s in schemas if s.arguments and s.arguments[0].alias_info is not None and s.arguments[0].alias_info.is_write]


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 5, 8)}


@pytest.mark.parametrize("how", OUT_OF_PLACE)
def test_a_write_nobody_sees_is_gone_and_the_simulation_trains(how: str) -> None:
    model = Writes(how).eval()
    graph = trace(model, example())
    assert writing_ops(graph) == []
    other = {"x": torch.randn(2, 7, 8)}
    assert torch.equal(graph(**other)["logits"], model(**other)["logits"])
    sim = QuantSim(model, QuantConfig(), example())
    sim.compute_encodings([other])
    sim.model(**other)["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sim.range_parameters())


@pytest.mark.parametrize("how", SEEN)
def test_a_write_that_is_seen_elsewhere_stays(how: str) -> None:
    model = Writes(how).eval()
    graph = trace(model, example())
    assert writing_ops(graph) != []
    other = {"x": torch.randn(2, 7, 8)}
    with torch.no_grad():
        assert torch.equal(graph(**other)["logits"], model(**other)["logits"])
