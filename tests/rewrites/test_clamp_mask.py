"""The attention mask's clamp: scores + (-6 where hidden), for every way in which a mask is written."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig

from quantsim import CalibrationError, QuantConfig, QuantSim, clamp_mask, trace
from quantsim.graph.roles import MASK_ADD, MASK_FILL, Roles
from tests.tiny import clone, tiny_batch, tiny_bert, tiny_graph, tiny_sim

LOWEST = torch.finfo(torch.float32).min
WRITTEN = ["add", "subtract", "masked_fill", "masked_fill_", "masked_fill_ expanded", "where hidden", "where kept"]


class Attention(nn.Module):
    """One head of attention over embedded ids; ``written`` says how its padding mask is."""

    def __init__(self, written: str, value: float = LOWEST) -> None:
        super().__init__()
        self.config = PretrainedConfig(vocab_size=50)
        self.written, self.value = written, value
        self.word = nn.Embedding(50, 8)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def mask(self, scores: Tensor, hidden: Tensor) -> Tensor:
        if self.written == "add":
            return scores + hidden.to(scores.dtype) * self.value
        if self.written == "subtract":
            return scores - hidden.to(scores.dtype) * -self.value
        if self.written == "masked_fill_ expanded":
            return scores.masked_fill_(hidden.expand_as(scores), self.value)
        if self.written == "masked_fill":
            return scores.masked_fill(hidden, self.value)
        if self.written == "masked_fill_":
            return scores.masked_fill_(hidden, self.value)
        if self.written == "where hidden":
            return torch.where(hidden, self.value, scores)
        if self.written == "where kept":
            return torch.where(~hidden, scores, torch.tensor(self.value))
        return scores + torch.where(hidden, self.value, 0.0)  # "reference": what the clamp is to give

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.word(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(8)  # [rows, length, length]
        hidden = attention_mask[:, None, :] == 0
        probs = self.mask(scores, hidden).softmax(-1)
        return {"logits": self.out(probs @ x), "probs": probs}


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (rows, length)), "attention_mask": mask}


def attention(written: str) -> Attention:
    torch.manual_seed(0)
    model = Attention(written).eval()
    with torch.no_grad():
        model.word.weight.mul_(2)
    return model


@cache
def _traced(written: str) -> tuple[Attention, fx.GraphModule]:
    model = attention(written)
    return model, trace(model, batch())


def traced(written: str) -> tuple[Attention, fx.GraphModule]:
    return copy.deepcopy(_traced(written))


def reference_of(model: Attention, value: float) -> Attention:
    reference = Attention("reference", value).eval()
    reference.load_state_dict(model.state_dict())
    return reference


# ---- a tiny attention, its mask written in five ways ----


@pytest.mark.parametrize("value", [-6.0, -3.5])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_masked_score_is_the_score_plus_the_value(written: str, value: float) -> None:
    model, graph = traced(written)
    clamp_mask(graph, value)
    other = batch(4, 11)
    with torch.no_grad():
        actual, expected, before = graph(**other), reference_of(model, value)(**other), model(**other)
    torch.testing.assert_close(actual["probs"], expected["probs"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual["probs"], before["probs"], atol=1e-4), "the clamp moved nothing: it was not tested"


@pytest.mark.parametrize("written", WRITTEN)
def test_where_nothing_is_hidden_nothing_changes(written: str) -> None:
    model, graph = traced(written)
    clamp_mask(graph, -6.0)
    other = batch() | {"attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(graph(**other)["logits"], model(**other)["logits"])


@pytest.mark.parametrize("written", WRITTEN)
def test_the_large_number_is_gone_from_a_clamped_simulation(written: str) -> None:
    sim = QuantSim(attention(written), QuantConfig(), batch())
    sim.compute_encodings([batch()])
    masked = [p.name for p in sim.placements if p.attention == MASK_ADD and p.spec]
    assert len(masked) == 1
    assert -100 < sim.quantizers[masked[0]].min.item() < 0


@pytest.mark.parametrize("written", WRITTEN)
def test_without_the_clamp_calibration_names_the_edge_and_the_cure(written: str) -> None:
    sim = QuantSim(attention(written), QuantConfig(mask_clamp=None), batch())
    (edge,) = [p.name for p in sim.placements if p.attention in (MASK_ADD, MASK_FILL)]
    with pytest.raises(CalibrationError, match=rf"^{edge}: .*mask_clamp"):
        sim.compute_encodings([batch()])


# ---- BERT ----


@pytest.mark.parametrize("value", [-6.0, -20.0])
@torch.no_grad()
def test_bert_equals_itself_with_that_mask(value: float) -> None:
    """Hugging Face's BERT takes a mask of four axes as it is: ``[rows, 1, length, length]``."""
    model, data = tiny_bert(), tiny_batch(3, 9)
    graph = clamp_mask(tiny_graph(), value)
    added = torch.where(data["attention_mask"] == 0, value, 0.0)[:, None, None, :].expand(-1, 1, 9, -1)
    expected = model(**(data | {"attention_mask": added})).logits
    torch.testing.assert_close(graph(**data).logits, expected, rtol=1e-6, atol=1e-6)
    assert (expected - model(**data).logits).abs().max() > (1e-4 if value == -6.0 else 0)


def test_one_clamp_serves_every_layer() -> None:
    graph = clamp_mask(tiny_graph(), -6.0)
    clamps = [node for node in graph.graph.nodes if node.target is torch.ops.aten.clamp.default]
    assert len(clamps) == 1
    assert clamps[0].args[1] == -6.0
    adds = [node for node, role in Roles(graph).role.items() if role == MASK_ADD]
    assert len(adds) == 2
    assert set(clamps[0].users) >= {add for add in adds if clamps[0] in add.args}


@torch.no_grad()
def test_without_padding_bert_is_bitwise_unchanged() -> None:
    model, data = tiny_bert(), tiny_batch(3, 9)
    data["attention_mask"].fill_(1)
    assert torch.equal(clamp_mask(tiny_graph(), -6.0)(**data).logits, model(**data).logits)


@pytest.mark.parametrize("calibrated_before", [False, True], ids=["first calibration", "second calibration"])
def test_a_refused_calibration_leaves_every_range_and_state(calibrated_before: bool) -> None:
    config = QuantConfig(mask_clamp=None, name="unclamped")
    sim = tiny_sim(config=config, calibrated=False)
    whole = tiny_batch()
    whole["attention_mask"].fill_(1)
    if calibrated_before:
        sim = clone(sim)
        sim.compute_encodings([whole])
    before = {name: (q.state, q.min.clone(), q.max.clone()) for name, q in sim.quantizers.items()}
    with pytest.raises(CalibrationError, match=r"bert\.encoder\.layer\.0\.attention\.self\.add.*mask_clamp"):
        sim.compute_encodings([tiny_batch(seed=9)])
    for name, q in sim.quantizers.items():
        state, low, high = before[name]
        assert q.state is state
        assert torch.equal(q.min, low)
        assert torch.equal(q.max, high)
    assert not sim.model.training
