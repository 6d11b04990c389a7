"""Lowering: which kernels the graph gets, and that it computes what the simulation does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from quantsim import LoweringError, QuantConfig, QuantSim, Rule, compare_lowered, lower_int8
from quantsim.graph.roles import op_of
from quantsim.kernels.cpu import missing_for_int8
from quantsim.kernels.edges import from_integers, look_up, on_grid, to_integers
from quantsim.kernels.int8_attention import missing_for_attention
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.rewrites.lower_int8 import attention_int8
from tests.tiny import HEADS, VOCAB, batch_for, tensors_of, tiny_batch, tiny_bert, tiny_config, tiny_sim

PRESETS = QuantConfig.presets()
SATURATES = missing_for_int8()
WAYS = [pytest.param(True, id="kernel", marks=pytest.mark.skipif(bool(SATURATES), reason=SATURATES)), pytest.param(False, id="float32")]


def lowered(sim: QuantSim, packs: bool = not SATURATES) -> fx.GraphModule:
    return lower_int8(sim.graph, sim.placements, packs)


def calls(graph: fx.GraphModule) -> Counter[str]:
    """How often each kernel or op is called."""
    names = Counter[str]()
    for node in graph.graph.nodes:
        if node.op == "call_module":
            names[type(graph.get_submodule(str(node.target))).__name__] += 1
        elif node.op == "call_function":
            names[op_of(node, graph)] += 1
    return names


@torch.no_grad()
def same_as_simulated(sim: QuantSim, graph: fx.GraphModule, head: str = "BertForSequenceClassification") -> None:
    """Logits within a step of the last grid where a value fell on the other side of a tie, nearly always equal."""
    for rows, length in ((4, 10), (1, 1), (3, 17)):
        batch = batch_for(head, rows, length, seed=rows)
        expected, found = tensors_of(sim.model(**batch)), tensors_of(graph(**batch))
        assert list(found) == list(expected)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=0.02 * x.abs().max().item(), msg=name)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("packs", WAYS)
def test_every_preset_computes_what_its_simulation_does(preset, packs):
    sim = tiny_sim(config=preset)
    same_as_simulated(sim, lowered(sim, packs))


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head):
    sim = tiny_sim(head)
    same_as_simulated(sim, lowered(sim), head)


def test_aimet_has_no_linear_and_no_gelu_in_float():
    found = calls(lowered(tiny_sim()))
    assert found["Int8Linear"] == 10  # query, key and value are one; pooler and classifier
    assert found["linear"] == found["gelu"] == found["tanh"] == 0
    assert found["look_up"] == 3  # two GELUs, a tanh
    assert found["FakeQuantizer"] == found["WeightQuantizer"] == found["Dropout"] == 0


@pytest.mark.skipif(bool(SATURATES or missing_for_attention()), reason=SATURATES or missing_for_attention())
@pytest.mark.parametrize("preset", ["aimet", "bondarenko"])
def test_attention_of_8_bits_is_one_kernel(preset):
    """Its heads are 16 wide, as the kernel asks; those of the other tests are not, and keep their ops."""
    model = tiny_bert(hidden_size=32)
    sim = QuantSim(model, preset)
    sim.compute_encodings([tiny_batch()])
    graph = lowered(sim)
    found = calls(graph)
    assert found["Int8Attention"] == 2
    assert found["softmax"] == found["scaled_matmul"] == found["matmul"] == 0
    same_as_simulated(sim, graph)
    assert compare_lowered(sim.graph, graph, [tiny_batch()]).holds
    assert (
        calls(lowered(sim, packs=False))["Int8Attention"] == calls(lower_int8(sim.graph, sim.placements, exact=True))["Int8Attention"] == 0
    )


def test_attention_keeps_its_ops_where_the_kernel_does_not_run(monkeypatch):
    monkeypatch.setattr(attention_int8, "missing_for_attention", lambda: "no compiler")
    model = tiny_bert(hidden_size=32)
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch()])
    graph = lowered(sim)
    assert calls(graph)["Int8Attention"] == 0
    assert calls(graph)["scaled_matmul"] == 4
    same_as_simulated(sim, graph)


def test_deploy_keeps_floats_between_products_alone():
    graph = lowered(tiny_sim(config="deploy"))
    found = calls(graph)
    assert found["Int8Linear"] == 10
    assert found["scaled_matmul"] == 4  # heads of 8 channels are too narrow for the kernel
    assert found["softmax"] == 2
    assert found["matmul"] == found["gelu"] == found["on_grid"] == 0
    fused = [m for m in graph.modules() if isinstance(m, Int8Linear) and m.post_op == "gelu"]
    assert len(fused) == 2
    assert all(m.requantizes for m in fused)
    products = [m for m in graph.modules() if isinstance(m, Int8Linear) and len(m.outputs) == 3]
    assert [out.width for out in products[0].outputs] == [16, 16, 16]


def test_attention_without_quantizers_is_one_kernel():
    config = replace(QuantConfig.preset("deploy"), activations_before=("linear",))
    found = calls(lowered(tiny_sim(config=config)))
    assert found["scaled_dot_product_attention"] == 2
    assert found["softmax"] == found["matmul"] == 0


def test_deploy_quantizes_what_products_read():
    sim = tiny_sim(config="deploy")
    quantized = [p.name for p in sim.placements if p.spec and p.role == "activation"]
    layer = "bert.encoder.layer.0."
    assert [name.removeprefix(layer) for name in quantized if name.startswith(layer)] == [
        "attention.self.query.output",
        "attention.self.key.output",
        "attention.self.value.output",
        "attention.self.softmax",
        "attention.self.matmul_1",
        "attention.output.LayerNorm.output",
        "intermediate.intermediate_act_fn.output",
        "output.LayerNorm.output",
    ]
    assert [name for name in quantized if "encoder" not in name] == ["bert.embeddings.LayerNorm.output", "bert.pooler.activation.output"]


def test_integers_are_moved_as_integers():
    graph = lowered(tiny_sim())
    for node in graph.graph.nodes:
        if op_of(node, graph) in ("view", "transpose", "reshape", "contiguous"):
            assert node.args[0].target is not from_integers, node


def test_an_edge_that_only_floats_read_is_not_stored():
    graph = lowered(tiny_sim())
    for node in graph.graph.find_nodes(op="call_function", target=to_integers):
        assert any(user.target is not from_integers for user in node.users), node
    assert graph.graph.find_nodes(op="call_function", target=on_grid)


def test_no_weight_is_kept_in_float32():
    graph = lowered(tiny_sim())
    matrices = [name for name, x in graph.named_buffers() if x.ndim > 1 and x.is_floating_point()]
    assert matrices == []
    assert list(graph.parameters()) == []


def test_the_simulation_stays_as_it_is():
    sim = tiny_sim()
    before = sim.model(**tiny_batch()).logits
    names = list(sim.model.state_dict())
    lowered(sim)
    assert torch.equal(sim.model(**tiny_batch()).logits, before)
    assert list(sim.model.state_dict()) == names


def test_low_rank_weights_are_computed_once():
    from recipes.low_rank import add_low_rank

    model = tiny_bert()
    add_low_rank(model, 2, seed=0)
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch()])
    graph = lowered(sim)
    same_as_simulated(sim, graph)
    assert calls(graph)["Int8Linear"] == 10


@pytest.mark.parametrize(
    "rule, kept",
    [
        (Rule(op="linear", role="weight", set={"bits": 16}), "linear"),
        (Rule(op="linear", role="weight", set={"symmetric": False}), "linear"),
        (Rule(op="layer_norm", role="activation", set={"bits": 16}), "FakeQuantizer"),
        (Rule(op="gelu", role="activation", enabled=False), "linear"),
    ],
    ids=["16-bit weights", "asymmetric weights", "16-bit activations", "floats come in"],
)
def test_what_has_no_integer_kernel_stays_as_it_was_simulated(rule, kept):
    sim = tiny_sim(config=QuantConfig.preset("aimet").with_rules(rule))
    graph = lowered(sim)
    assert calls(graph)[kept] > 0
    same_as_simulated(sim, graph)


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_grids_are_kept(bits):
    sim = tiny_sim(config=QuantConfig.preset("aimet").with_rules(Rule(module="*", role="activation", set={"bits": bits})))
    same_as_simulated(sim, lowered(sim))


def test_symmetric_activations_are_int8():
    config = QuantConfig.preset("aimet").with_rules(Rule(module="*", role="activation", set={"symmetric": True}))
    sim = tiny_sim(config=config)
    graph = lowered(sim)
    same_as_simulated(sim, graph)
    assert {m.grid.dtype for m in graph.modules() if isinstance(m, Int8Linear)} == {torch.int8}
    assert {node.args[2] for node in graph.graph.find_nodes(op="call_function", target=look_up)} == {-128}


def test_an_uncalibrated_simulation_is_refused():
    with pytest.raises(LoweringError, match=r"word_embeddings.*is off; call compute_encodings"):
        lowered(tiny_sim(calibrated=False))


def test_learning_ranges_are_frozen_as_they_are():
    sim = tiny_sim()
    assert any(isinstance(m, FakeQuantizer) and m.min.requires_grad for m in sim.model.modules())
    graph = lowered(sim)
    kept = [*graph.parameters(), *graph.buffers()]
    assert kept
    assert not any(x.requires_grad for x in kept)


def test_training_that_goes_on_does_not_change_what_was_lowered():
    config = QuantConfig.preset("aimet").with_rules(Rule(op="layer_norm", role="activation", set={"bits": 16}))  # keeps quantizers
    sim = tiny_sim(config=config)
    sim.model.train()
    learning = {name for name, p in sim.model.named_parameters() if p.requires_grad}
    graph = lowered(sim)
    before = graph(**tiny_batch())["logits"]
    assert learning == {name for name, p in sim.model.named_parameters() if p.requires_grad}
    assert all(m.training for m in sim.model.modules())
    with torch.no_grad():
        for p in sim.model.parameters():
            p.mul_(1.5).add_(0.01)
    assert torch.equal(graph(**tiny_batch())["logits"], before)


def test_a_model_that_is_not_in_float32_is_refused():
    sim = QuantSim(tiny_bert(num_hidden_layers=1).bfloat16())
    sim.compute_encodings([tiny_batch()])
    with pytest.raises(LoweringError, match=r"torch.bfloat16; expected torch.float32.*model.float\(\), and calibrate that"):
        lowered(sim)


@pytest.mark.parametrize("preset", ["aimet", "deploy"])
@pytest.mark.parametrize("packs", WAYS)
def test_layers_that_are_called_again_have_a_product_a_call_and_one_weight(preset, packs):
    torch.manual_seed(0)
    model = AlbertForSequenceClassification(AlbertConfig(**tiny_config(num_hidden_layers=3).to_dict(), embedding_size=8))
    sim = QuantSim(model.eval(), preset)
    sim.compute_encodings([tiny_batch(seed=seed) for seed in (1, 2)])
    graph = lowered(sim, packs)
    assert compare_lowered(sim.graph, graph, [tiny_batch(seed=3)]).holds
    same_as_simulated(sim, graph)
    queries = [m for m in graph.modules() if isinstance(m, Int8Linear) and m.outputs[0].weight.endswith("query.weight")]
    assert len(queries) == 3
    assert len({id(m.weight) for m in queries}) == 1


class Odd(PreTrainedModel):
    """A small model around :meth:`between`, for graphs that no encoder here has."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embedding, self.norm = nn.Embedding(VOCAB, 16), nn.LayerNorm(16)
        self.one, self.two, self.qkv = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 48)
        self.out = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        x = self.norm(self.embedding(input_ids))
        return SequenceClassifierOutput(logits=self.out(self.between(x, attention_mask[:, None, :].float())[:, 0]))

    def between(self, x: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class FlattenedBesideAnother(Odd):
    def between(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.one(x).view(x.shape[0], -1).sum(-1)[:, None, None] + self.two(x)


class SplitByTheModel(Odd):
    def between(self, x: Tensor, mask: Tensor) -> Tensor:
        first, second = self.one(x).split([4, 12], -1)
        return torch.cat([second.tanh(), first], -1)


class MaskTimesTwo(Odd):
    def between(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return functional.softmax(torch.add(query @ key.mT / 4, (1 - mask) * -2, alpha=2), -1) @ value


class MaskWiderThanScores(Odd):
    def between(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return functional.softmax(query[:1] @ key[:1].mT / 4 + (1 - mask) * -2, -1) @ value


@pytest.mark.parametrize("preset", ["aimet", "deploy"])
@pytest.mark.parametrize("model", [FlattenedBesideAnother, SplitByTheModel, MaskTimesTwo, MaskWiderThanScores])
def test_odd_graphs(model, preset):
    torch.manual_seed(0)
    batches = [{name: x for name, x in tiny_batch(seed=seed).items() if name != "token_type_ids"} for seed in (1, 2, 3)]
    sim = QuantSim(model(BertConfig()).eval(), preset, batches[0])
    sim.compute_encodings(batches[:2])
    low = sim.lower()
    assert compare_lowered(sim.graph, low.graph, batches[2:]).holds
    found, expected = low.model(**batches[2]).logits, sim.model(**batches[2]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert "int8 product" in str(low)


def test_no_tensor_is_made_on_the_default_device():
    sim = tiny_sim()
    with torch.device("meta"):
        graph = lowered(sim, packs=False)
    same_as_simulated(sim, graph)


def test_weights_are_not_written_over():
    """A table of more than 8 bits is quantized where it stands by no one."""
    sim = QuantSim(tiny_bert(), QuantConfig.preset("aimet").with_rules(Rule(op="embedding", role="weight", set={"bits": 16})))
    sim.compute_encodings([tiny_batch()])
    before = {name: x.clone() for name, x in sim.model.state_dict().items()}
    lowered(sim)
    assert all(torch.equal(x, before[name]) for name, x in sim.model.state_dict().items())


class Biased(torch.nn.Module):
    """Attention with a bias of the scores that is computed, and quantized; and a conversion that moves integers no further."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.bias = (torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        heads = [linear(x).unflatten(-1, (2, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v, self.bias)]
        q, k, v, b = heads
        scores = q @ k.transpose(2, 3) * 0.25 + b @ b.transpose(2, 3)
        return (torch.relu(scores.softmax(-1) @ v)).transpose(1, 2).flatten(2)


class Converted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).type_as(x))


@pytest.mark.parametrize("model, x", [(Biased, (2, 6, 32)), (Converted, (3, 8))])
def test_models_of_ones_own(model, x):
    torch.manual_seed(0)
    batch = {"x": torch.randn(x)}
    sim = QuantSim(model().eval(), QuantConfig.preset("aimet"), batch)
    sim.compute_encodings([batch])
    with torch.no_grad():
        expected = sim.model(**batch)
        assert torch.equal(sim.lower(exact=True).model(**batch), expected)
        assert (sim.lower().model(**batch) - expected).abs().max() < 0.1
