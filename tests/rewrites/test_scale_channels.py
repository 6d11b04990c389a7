"""Streams: what is found, that scaling one changes nothing to the bit, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from transformers import AlbertConfig, AlbertModel, ModernBertConfig, ModernBertModel, ViTConfig, ViTModel

from quantsim import QuantConfig, place, trace
from quantsim.rewrites.insert_quantizers import insert_quantizers
from quantsim.rewrites.scale_channels import find_streams, fold, unscale_reads
from tests.rewrites.test_insert_quantizers import LowRank
from tests.tiny import tiny_batch, tiny_bert, tiny_graph, tiny_sim

PARTS = [f"layer.{i}.{part}" for i in range(2) for part in ("attention.output", "output")]
BLOCKS = ["bert.embeddings.LayerNorm", *(f"bert.encoder.{part}.LayerNorm" for part in PARTS)]


def powers(size: int, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, (size,), generator=torch.Generator().manual_seed(seed)).float().exp2()


def small(cls: type[nn.Module], config_class: Any, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = cls(config_class(**(sizes | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def test_a_post_norm_block_is_scaled_from_norm_to_norm() -> None:
    streams = find_streams(tiny_graph())
    assert [s.name for s in streams] == [f"{name}.output" for name in BLOCKS[:-1]]  # the last is read by no linear
    attention, feed_forward = streams[:2]
    assert [len(s.reading) for s in streams[:2]] == [3, 1]  # query, key, value; the feed-forward
    for stream in (attention, feed_forward):
        assert [str(n.target) for n in stream.edges] == ["aten.layer_norm.default", "aten.linear.default", "aten.add.Tensor"]
        ((value, readers),) = stream.unscaled.items()
        assert (value, [str(n.target) for n in readers]) == (stream.edges[-1], ["aten.layer_norm.default"])


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "with quantizers that are off"])
def test_scaling_by_powers_of_two_changes_no_bit(quantized: bool) -> None:
    graph, plain = tiny_graph(), tiny_graph()
    unscale_reads(graph)
    if quantized:
        insert_quantizers(graph, place(graph, QuantConfig.preset("aimet")))
    batch = tiny_batch(seed=5)
    with torch.no_grad():
        expected = plain(**batch).logits
        assert torch.equal(graph(**batch).logits, expected)
        before = {k: v.clone() for k, v in graph.state_dict().items()}
        for i, stream in enumerate(find_streams(graph)):
            fold(graph, stream, powers(16, i))
        for i, stream in enumerate(find_streams(graph)):
            fold(graph, stream, powers(16, i + 9))  # once more, beside the first
        assert torch.equal(graph(**batch).logits, expected)
    changed = {k for k, v in graph.state_dict().items() if not torch.equal(v, before[k])}
    assert sum(".LayerNorm." in k for k in changed if not k.startswith("scales.")) == 2 * 4
    assert {k for k in changed if k.startswith("scales.")} == {f"scales.{name}.output.scale" for name in BLOCKS[:-1]}


def test_any_other_scale_changes_the_rounding_alone() -> None:
    graph = unscale_reads(tiny_graph()).double()
    batch = tiny_batch(seed=5)
    with torch.no_grad():
        expected = graph(**batch).logits
        for stream in find_streams(graph):
            fold(graph, stream, torch.rand(16, dtype=torch.float64) * 9 + 0.1)
        torch.testing.assert_close(graph(**batch).logits, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def assert_unchanged_by_scaling(graph: fx.GraphModule, batch: dict[str, Tensor]) -> None:
    expected = graph(**batch).last_hidden_state.clone()
    for stream in find_streams(unscale_reads(graph)):
        fold(graph, stream, powers(16))
    assert torch.equal(graph(**batch).last_hidden_state, expected)


def test_where_linears_alone_read_a_norm_no_op_is_added() -> None:
    graph = trace(small(ViTModel, ViTConfig, image_size=8, patch_size=4, num_channels=1))
    assert [len(s.reading) for s in find_streams(graph)] == [3, 1, 3, 1]
    nodes = len(graph.graph.nodes)
    assert_unchanged_by_scaling(graph, {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))})
    assert len(graph.graph.nodes) == nodes


def test_a_residual_stream_that_begins_at_a_norm_is_scaled_to_its_end() -> None:
    graph = trace(small(ModernBertModel, ModernBertConfig, vocab_size=99, max_position_embeddings=64, pad_token_id=0))
    whole, *parts = find_streams(graph)
    assert (len(whole.joining), len(whole.reading), len(whole.unscaled)) == (4, 1, 4)  # both sublayers of both layers; four norms
    assert [(len(s.joining), len(s.reading), len(s.unscaled)) for s in parts] == [(0, 1, 0)] * 3
    assert_unchanged_by_scaling(graph, {"input_ids": torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(3))})


def test_layers_that_are_called_again_are_left_alone() -> None:
    graph = trace(small(AlbertModel, AlbertConfig, vocab_size=99, embedding_size=8))
    assert [s.name for s in find_streams(graph)] == ["embeddings.LayerNorm.output"]  # read once, by a linear


def test_a_weight_that_is_computed_takes_no_scale() -> None:
    model: Any = tiny_bert()
    parametrize.register_parametrization(model.bert.encoder.layer[0].intermediate.dense, "weight", LowRank(32, 16))
    graph = trace(model)
    name = "bert.encoder.layer.0.attention.output.LayerNorm.output"
    (stream,) = (s for s in find_streams(graph) if s.name == name)
    assert stream.reading == ()  # reads it unscaled
    assert len(stream.unscaled) == 2
    unscale_reads(graph)
    batch = tiny_batch()
    with torch.no_grad():
        expected = graph(**batch).logits
        (stream,) = (s for s in find_streams(graph) if s.name == name)
        fold(graph, stream, powers(16))
        assert torch.equal(graph(**batch).logits, expected)


def test_everything_stays_trainable() -> None:
    sim = tiny_sim(calibrated=False)
    graph = unscale_reads(sim.graph)
    for stream in find_streams(graph):
        fold(graph, stream, powers(16))
    sim.model(**tiny_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    without = [name for name, p in sim.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
