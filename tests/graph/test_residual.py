"""The residual stream by dataflow: norms, the sums between them, the linears that are added; nothing of attentions, biases or rotations."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, ModernBertConfig, ModernBertModel, ViTConfig, ViTModel

from quantsim import QuantConfig, Rule, place
from quantsim.graph.roles import RESIDUAL, Roles
from quantsim.graph.trace import trace
from tests.tiny import tiny_graph

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
POST_NORM = """
bert.embeddings.LayerNorm.output layer_norm
bert.embeddings.add add
bert.embeddings.add_1 add
bert.encoder.layer.0.attention.output.LayerNorm.output layer_norm
bert.encoder.layer.0.attention.output.add add
bert.encoder.layer.0.attention.output.dense.output linear
bert.encoder.layer.0.output.LayerNorm.output layer_norm
bert.encoder.layer.0.output.add add
bert.encoder.layer.0.output.dense.output linear
"""


def residual(graph: Any) -> set[tuple[str, str]]:
    roles = Roles(graph)
    return {(roles.name[node], roles.op[node]) for node, role in roles.role.items() if role == RESIDUAL}


def test_norms_after_sums() -> None:
    found = residual(tiny_graph())
    first = {(name, op) for name, op in found if ".layer.1." not in name}
    assert first == {tuple(line.split()) for line in POST_NORM.strip().splitlines()}


def models() -> list[Any]:
    modern = ModernBertConfig(vocab_size=99, pad_token_id=0, **SIZES, max_position_embeddings=32)
    vit = ViTConfig(image_size=16, patch_size=8, **SIZES)
    return [pytest.param(ModernBertModel(modern), 2, id="ModernBERT"), pytest.param(ViTModel(vit, add_pooling_layer=False), 2, id="ViT")]


@pytest.mark.parametrize(("model", "linears"), models())
def test_norms_before_linears(model: nn.Module, linears: int) -> None:
    """Two linears are added in a layer; what turns queries and keys by position is as wide as a head, and no part of it."""
    found = residual(trace(model.eval()))
    assert sum(op == "linear" for _, op in found) == linears
    assert sum(op == "add" for _, op in found) >= linears
    assert not any("rotary" in name for name, _ in found)
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert sum(op == "layer_norm" for _, op in found) == norms


def test_sums_of_scores_are_no_part() -> None:
    """Relative positions are added to scores, whose width is the sequence's."""
    config = DebertaV2Config(vocab_size=99, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=32, **SIZES)
    found = residual(trace(DebertaV2Model(config).eval()))
    assert found
    assert not any(".attention.self." in name for name, _ in found)


def test_a_rule_takes_the_role() -> None:
    config = QuantConfig.preset("aimet").with_rules(Rule(op=RESIDUAL, role="activation", set={"bits": 16}))
    wide = {p.name for p in place(tiny_graph(), config) if p.spec and p.spec.bits == 16}
    assert wide == {name for name, _ in residual(tiny_graph())} - {
        p.name for p in place(tiny_graph(), QuantConfig.preset("aimet")) if not p.spec
    }
