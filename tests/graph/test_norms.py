"""Norms that a model writes out are one op: found whatever way they are written, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantsim import QuantConfig, QuantSim, place, trace
from quantsim.graph.norms import find_norms
from quantsim.graph.roles import Roles

EPS = 1e-6


class Written(nn.Module):
    """A linear, a norm written as ``how`` says, and a linear."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.how = how
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)
        self.gamma, self.beta = nn.Parameter(1 + 0.1 * torch.randn(8)), nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.before(x)
        return {"logits": self.after(getattr(self, self.how)(h) + h)}

    def layer_norm(self, h: Tensor) -> Tensor:
        mean = h.mean(-1, keepdim=True)
        variance = (h - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * ((h - mean) / torch.sqrt(variance + EPS)) + self.beta

    def layer_norm_by_square(self, h: Tensor) -> Tensor:
        centered = h - h.mean(-1, keepdim=True)
        return centered * (centered * centered).mean(-1, keepdim=True).add(EPS).rsqrt() * self.gamma + self.beta

    def rms_norm(self, h: Tensor) -> Tensor:
        h = h.to(torch.float32)
        return self.gamma * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(torch.float32)

    def rms_norm_of_one_plus(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * (1.0 + self.gamma)

    def rms_norm_by_reciprocal(self, h: Tensor) -> Tensor:
        return h * (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt().reciprocal()

    def rms_norm_by_power(self, h: Tensor) -> Tensor:
        return h * (h.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5) * self.gamma

    def divided_by_a_mean(self, h: Tensor) -> Tensor:
        return h / (h.abs().mean(-1, keepdim=True) + EPS).sqrt()

    def root_of_another(self, h: Tensor) -> Tensor:
        return h.tanh() / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    def cubes(self, h: Tensor) -> Tensor:
        return h / (h.pow(4).mean(-1, keepdim=True) + EPS).sqrt()


NORMS = [name for name in vars(Written) if name.startswith(("layer_norm", "rms_norm"))]
OTHERS = ["divided_by_a_mean", "root_of_another", "cubes"]


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 6, 8)}


@pytest.mark.parametrize("how", NORMS)
def test_a_norm_has_one_edge(how: str) -> None:
    graph = trace(Written(how).eval(), example())
    (norm,) = find_norms(Roles(graph))
    assert norm.kind == ("layer_norm" if how.startswith("layer") else "rms_norm")
    placements = place(graph, QuantConfig.preset("aimet"))
    activations = [p.op for p in placements if p.role == "activation" and p.spec]
    assert activations == ["linear", norm.kind, "add", "linear"]
    weights = {p.name: p.op for p in placements if p.role == "weight"}
    expected = {"before.weight": "linear", "after.weight": "linear"}
    if "reciprocal" not in how:
        expected |= {next(name for name in weights if name not in expected): norm.kind}
    assert weights == expected


@pytest.mark.parametrize("how", OTHERS)
def test_what_is_no_norm_keeps_its_edges(how: str) -> None:
    graph = trace(Written(how).eval(), example())
    assert find_norms(Roles(graph)) == []
    assert {"div", "sqrt"} <= {p.op for p in place(graph, QuantConfig.preset("aimet")) if p.role == "activation" and p.spec}


@pytest.mark.parametrize("how", NORMS)
def test_rows_of_different_size_survive(how: str) -> None:
    """On a grid of its own the variance of the small rows would round to 0, and what is divided by its root would be huge."""
    torch.manual_seed(0)
    sim = QuantSim(Written(how).eval(), example_inputs=example())
    with torch.no_grad():
        sim.model.before.bias.zero_()
        data = {"x": torch.cat([torch.randn(2, 6, 8), 0.05 * torch.randn(2, 6, 8)])}
        exact = sim.model(**data)["logits"]
        sim.compute_encodings([data])
        found = sim.model(**data)["logits"]
    assert (found - exact).abs().max() < exact.abs().max()
