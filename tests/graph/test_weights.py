"""Where learned values enter: every parameter once, wherever and however it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig

from quantsim import QuantConfig, QuantSim
from quantsim.quantizers.fake_quantizer import WeightQuantizer


class Uses(nn.Module):
    """A table of 12 rows, used as ``how`` says beside a linear."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.how = how
        self.linear = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(12, 8))
        self.more = nn.Parameter(torch.randn(4, 12))
        self.vector, self.heads = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": getattr(self, self.how)(self.linear(x))}

    def added(self, h: Tensor) -> Tensor:
        return h + self.table[:6]

    def multiplied_from_the_right(self, h: Tensor) -> Tensor:
        return h @ self.table.t()

    def joined_to_one_matrix(self, h: Tensor) -> Tensor:
        wide = torch.cat([h, h[..., :4]], -1)
        return wide @ torch.cat([self.table.t(), self.more], 0)

    def used_twice(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.table) @ self.table

    def read_by_a_linear(self, h: Tensor) -> Tensor:
        return h @ self.linear(self.table[2:]).t()

    def joined_to_values(self, h: Tensor) -> Tensor:
        return torch.cat([self.table[:1].expand(h.shape[0], 1, 8), h], 1)

    def vectors_and_scalars(self, h: Tensor) -> Tensor:
        heads = h.view(h.shape[0], h.shape[1], 2, 4) + self.heads.view(1, 1, 2, 4)
        return (heads.reshape(h.shape) + self.vector) * self.scale

    def vector_as_factor(self, h: Tensor) -> Tensor:
        return h * self.vector


WEIGHTS = {  # how: parameter → the axis of its ranges
    "added": {"table": None},
    "multiplied_from_the_right": {"table": 0},
    "joined_to_one_matrix": {"table": 0, "more": 1},
    "used_twice": {"table": 0},
    "read_by_a_linear": {"table": None},
    "joined_to_values": {},
    "vectors_and_scalars": {},
    "vector_as_factor": {"vector": None},
}


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 6, 8)}


@pytest.mark.parametrize("how", WEIGHTS)
def test_each_parameter_has_one_quantizer_of_its_own_values(how: str) -> None:
    model = Uses(how).eval()
    sim = QuantSim(model, "aimet", {"x": torch.randn(3, 6, 8)}, in_place=True)
    found = {name: q for name, q in sim.quantizers.items() if isinstance(q, WeightQuantizer) and name != "linear.weight"}
    assert {name: q.spec.axis for name, q in found.items()} == WEIGHTS[how]
    sim.compute_encodings([example()])
    for name, q in found.items():
        parameter = getattr(model, name).detach()
        low = parameter.amin(dim=[i for i in range(parameter.ndim) if i != q.spec.axis]) if q.spec.axis is not None else parameter.min()
        high = parameter.amax(dim=[i for i in range(parameter.ndim) if i != q.spec.axis]) if q.spec.axis is not None else parameter.max()
        assert torch.equal(q.min.detach(), low.clamp(max=0)) or torch.equal(q.min.detach(), low)
        assert torch.equal(q.max.detach(), high.clamp(min=0)) or torch.equal(q.max.detach(), high)
    sim.model(**example())["logits"].square().sum().backward()
    assert all(q.min.grad is not None and q.max.grad is not None for q in found.values())


def test_what_is_joined_to_values_says_where_it_is_quantized() -> None:
    sim = QuantSim(Uses("joined_to_values").eval(), QuantConfig(), example())
    (edge,) = [p for p in sim.placements if p.name == "table"]
    assert edge.spec is None
    assert edge.reason == "quantized with the output of cat"
    assert [p.op for p in sim.placements if p.role == "activation" and p.spec] == ["linear", "cat"]


def test_vectors_that_are_added_are_biases() -> None:
    assert "3 biases are not quantized" in str(QuantSim(Uses("vectors_and_scalars").eval(), QuantConfig(), example()))


class LowRank(nn.Module):
    """``W + B A``, computed at every use."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(torch.randn(8, rank)), nn.Parameter(torch.randn(rank, 8))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def test_a_weight_that_is_computed_at_every_call_is_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.linear = nn.Linear(8, 8)
            parametrize.register_parametrization(self.linear, "weight", LowRank())

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(self.linear(x).tanh())}

    sim = QuantSim(Twice().eval(), QuantConfig(), example())
    assert [name for name, q in sim.quantizers.items() if isinstance(q, WeightQuantizer)] == ["linear.weight"]
    assert [p.op for p in sim.placements if p.role == "activation" and p.spec] == ["linear", "tanh", "linear"]


def test_two_computed_weights_of_one_module_are_two() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.first, self.second = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": nn.functional.linear(nn.functional.linear(x, 2 * self.first), 3 * self.second)}

    sim = QuantSim(Two().eval(), QuantConfig(), example())
    assert [name for name, q in sim.quantizers.items() if isinstance(q, WeightQuantizer)] == ["weight", "weight_1"]
