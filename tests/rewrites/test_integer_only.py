"""The integer graph: no float in it, close to its simulation, equal to it but for rounding where functions are left in floating point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from quantsim import IntegerError, QuantConfig, QuantSim, Rule, find_floats, integer_only
from quantsim.kernels.edges import look_up
from quantsim.kernels.int8_matmul import int8_matmul
from quantsim.kernels.integer_rows import IntegerRows
from quantsim.numerics.dyadic import rescale, rescale_channels
from quantsim.numerics.polynomial import i_gelu, i_normalize, i_softmax, i_tanh
from quantsim.quantizers.fake_quantizer import State
from tests.rewrites.integer_models import BUILT_ON, FAMILIES, batch_of, model_of, simulated
from tests.tiny import tensors_of, tiny_batch, tiny_bert

IBERT = QuantConfig.preset("ibert")
HEADS = ["Model", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"]


def calls(graph, function) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=function))


# ---- no float ----


@pytest.mark.parametrize("family", FAMILIES)
def test_no_float_between_look_ups_and_outputs(family):
    assert find_floats(simulated(family).integer_only().graph, batch_of()) == []


@pytest.mark.parametrize("head", HEADS)
def test_no_float_in_any_head(head):
    assert find_floats(simulated("Bert", head).integer_only().graph, batch_of()) == []


@pytest.mark.parametrize("forced, op", [("gelu", "gelu"), ("softmax", "softmax"), ("layernorm", "layer_norm")])
def test_the_walk_finds_what_was_forced_to_float(forced, op):
    found = find_floats(simulated("Bert").integer_only(forced).graph, batch_of())
    assert any(op in use.op for use in found)
    assert {other for other in ("gelu", "softmax", "layer_norm") if any(other in use.op for use in found)} == {op}


def test_the_walk_looks_inside_functions_and_at_constants():
    graph = simulated("Bert").integer_only().graph
    node = next(iter(graph.graph.find_nodes(op="call_function", target=int8_matmul)))
    with graph.graph.inserting_after(node):
        half = graph.graph.call_function(hidden_float, (node,))
    node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
    graph.recompile()
    assert {use.node for use in find_floats(graph, batch_of())} == {half.name}


def hidden_float(x: Tensor) -> Tensor:
    return (x * 0.5).to(torch.int32)


# ---- values ----


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_between_products_in_one_pass_are_the_graphs_bits(family):
    integers = simulated(family).integer_only()
    if integers.unfused:
        pytest.skip(integers.unfused)
    fused = integers.model.__dict__["forward"].graph
    assert sum(isinstance(module, IntegerRows) for module in fused.modules()) > 5
    alone = {node.target for node in fused.graph.nodes} & {rescale, rescale_channels, i_gelu, i_softmax, i_normalize, i_tanh}
    assert not alone
    for seed, (rows, length) in enumerate([(4, 10), (1, 1), (3, 17)]):
        batch = batch_of(rows, length, seed)
        with torch.no_grad():
            assert torch.equal(integers.model(**batch).logits, integers.graph(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "64-bit products"])
def test_linear_arithmetic_is_the_simulations(family, kernel):
    """With nonlinear functions in floating point, what is left is products, rescales and adds: the simulation's but for ties."""
    sim = simulated(family)
    graph = integer_only(sim.graph, "nonlinear", kernel=kernel)
    differences = []
    for seed, (rows, length) in enumerate([(4, 10), (1, 1), (3, 17), (2, 5), (4, 9)]):
        batch = batch_of(rows, length, seed)
        with torch.no_grad():
            found, expected = graph(**batch).logits, sim.model(**batch).logits
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    assert sorted(differences)[len(differences) // 2] < 1e-6
    assert max(differences) < 0.1  # a value that fell on the other side of a tie, in a model 16 wide


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_the_simulation(family):
    sim = simulated(family)
    integers = sim.integer_only()
    for seed in range(3, 6):
        batch = batch_of(seed=seed)
        with torch.no_grad():
            found, expected = integers.model(**batch).logits, sim.model(**batch).logits
        noise = (found - expected).square().sum() / expected.square().sum()
        assert noise < 0.02  # 17 dB; weights here are wide, and every GELU is off by up to 0.018


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_what_its_model_does(head):
    sim = simulated("Bert", head)
    with torch.no_grad():
        expected, found = sim.model(**batch_of()), sim.integer_only().model(**batch_of())
    assert type(found) is type(expected)
    assert list(tensors_of(found)) == list(tensors_of(expected))
    for name, x in tensors_of(expected).items():
        assert tensors_of(found)[name].shape == x.shape
        assert (tensors_of(found)[name] - x).square().sum() < 0.03 * x.square().sum(), name


def test_padding_changes_no_bit():
    integers = simulated("Bert").integer_only()
    short = batch_of(2, 6)
    short["attention_mask"][:] = 1
    long = {name: nn.functional.pad(x, (0, 5)) for name, x in short.items()}
    with torch.no_grad():
        assert torch.equal(integers.model(**short).logits, integers.model(**long).logits)


def test_batch_composition_changes_no_bit():
    integers = simulated("Roberta").integer_only()
    batch = batch_of(4, 10)
    with torch.no_grad():
        together = integers.model(**batch).logits
        alone = torch.cat([integers.model(**{name: x[i : i + 1] for name, x in batch.items()}).logits for i in range(4)])
    assert torch.equal(together, alone)


def test_kernel_and_plain_integers_give_the_same_bits():
    sim = simulated("Electra")
    with torch.no_grad():
        assert torch.equal(integer_only(sim.graph)(**batch_of()).logits, integer_only(sim.graph, kernel=False)(**batch_of()).logits)


def test_a_mask_at_minus_six_is_added():
    sim = QuantSim(model_of("Bert"), replace(IBERT, mask_clamp=-6.0))
    sim.compute_encodings([batch_of(seed=1)])
    forced = sim.integer_only("nonlinear")
    assert find_floats(sim.integer_only().graph, batch_of()) == []
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert (forced.model(**batch_of()).logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_every_edge_in_8_bits_makes_tables():
    """Functions of an 8-bit edge are look-ups, equal to the polynomials that they replace."""
    sim = QuantSim(model_of("Bert"), replace(IBERT, activations_before=(), mask_clamp=-6.0))
    sim.compute_encodings([batch_of(seed=1)])
    integers = sim.integer_only()
    assert calls(integers.graph, look_up) == 3
    assert calls(integers.graph, i_gelu) == calls(integers.graph, i_tanh) == 0
    assert find_floats(integers.graph, batch_of()) == []
    with sim.integer_only_training(), torch.no_grad():  # without tables
        expected = sim.model(**batch_of()).logits
    assert torch.equal(integers.model(**batch_of()).logits, expected)


def test_zero_points():
    """Preset aimet: asymmetric edges everywhere, on both sides of attention products too."""
    sim = QuantSim(model_of("Bert"), "aimet")
    sim.compute_encodings([batch_of(seed=1)])
    assert find_floats(sim.integer_only().graph, batch_of()) == []
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert (sim.integer_only("nonlinear").model(**batch_of()).logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_zero_gamma_dead_channels_and_a_bias_without_weights():
    model = model_of("Bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.LayerNorm.weight[:3] = 0
        layer.intermediate.dense.weight[:2] = 0
        layer.intermediate.dense.bias[:2] = 1.5
        model.bert.embeddings.word_embeddings.weight[5] = 0
    sim = QuantSim(model, "ibert")
    sim.compute_encodings([batch_of(seed=1)])
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert (sim.integer_only("nonlinear").model(**batch_of()).logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_tensors_that_are_huge_or_tiny_do_not_overflow():
    for factor in (1e-6, 1e6):
        model = model_of("Bert")
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.query.weight.mul_(factor)
            model.bert.embeddings.word_embeddings.weight.mul_(factor)
            model.bert.encoder.layer[1].output.dense.bias.mul_(factor)
        sim = QuantSim(model, "ibert")
        sim.compute_encodings([batch_of(seed=1)])
        with torch.no_grad():
            expected = sim.model(**batch_of()).logits
            found = sim.integer_only("nonlinear").model(**batch_of()).logits
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_64_bits_are_shown():
    text = str(simulated("Bert").integer_only())
    assert "18 int8_matmul" in text.splitlines()[0]
    assert "ops compute in 64 bits" in text.splitlines()[1]
    assert "64: a sum of squares" in text
    assert "bert.encoder.layer.0.intermediate.intermediate_act_fn.output" in text


def test_residual_adds_of_8_bits_stay_in_32():
    graph = simulated("Bert").integer_only().graph
    narrow = [n for n in graph.graph.find_nodes(op="call_function", target=rescale) if not n.args[3]]
    assert len(narrow) >= 4


# ---- as its users hold it ----


def test_saved_as_int8_and_loaded_again(tmp_path):
    sim = simulated("Bert")
    integers = sim.integer_only()
    integers.save_pretrained(tmp_path)
    again = QuantSim.from_pretrained(tmp_path).integer_only()
    with torch.no_grad():
        assert torch.equal(again.model(**batch_of()).logits, integers.model(**batch_of()).logits)
    assert repr(integers).startswith("IntegerModel(BertForSequenceClassification, ibert")


def test_the_simulation_stays_as_it_is():
    sim = simulated("Bert")
    with torch.no_grad():
        before = sim.model(**batch_of()).logits
        integers = sim.integer_only()
        expected = integers.model(**batch_of()).logits
        assert torch.equal(sim.model(**batch_of()).logits, before)
        for p in sim.model.parameters():
            p.mul_(1.5)
        assert torch.equal(integers.model(**batch_of()).logits, expected)


def test_weights_are_stored_in_8_bits():
    graph = simulated("Bert").integer_only().graph
    matrices = {name: x for name, x in graph.named_buffers() if x.ndim > 1 and "position_ids" not in name and "constant" not in name}
    assert {x.dtype for x in matrices.values()} == {torch.int8}
    assert not any(x.is_floating_point() for x in graph.buffers())


# ---- bad input ----


def test_uncalibrated():
    with pytest.raises(IntegerError, match=r"word_embeddings.weight: its quantizer is off; call compute_encodings"):
        QuantSim(model_of("Bert"), "ibert").integer_only()


def test_a_missing_scale():
    sim = simulated("Bert")
    sim.quantizers["bert.encoder.layer.1.intermediate.intermediate_act_fn.output"].state = State.OFF
    with pytest.raises(IntegerError, match=r"layer.1.intermediate.intermediate_act_fn.output: its quantizer is off"):
        sim.integer_only()


def test_a_preset_that_quantizes_what_products_read_alone():
    sim = QuantSim(model_of("Bert"), "deploy")
    sim.compute_encodings([batch_of(seed=1)])
    assert find_floats(sim.integer_only().graph, batch_of()) == []


def test_a_config_that_leaves_attention_in_floating_point():
    sim = QuantSim(model_of("Bert"), replace(QuantConfig.preset("deploy"), activations_before=("linear",)))
    sim.compute_encodings([batch_of(seed=1)])
    with pytest.raises(IntegerError, match=r"has no scale of 8 bits.*preset 'ibert'"):
        sim.integer_only()


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_a_float_input(name):
    batch = batch_of()
    batch[name] = batch[name].float()
    with pytest.raises(TypeError, match=rf"{name}: torch.float32; an integer graph takes integers"):
        simulated("Bert").integer_only().model(**batch)


@pytest.mark.parametrize("activation, op", [("silu", "silu"), ("sigmoid", "sigmoid"), ("gelu_new", "pow")])
def test_an_activation_without_an_integer_form(activation, op):
    sim = QuantSim(model_of("Bert", hidden_act=activation), "ibert")
    sim.compute_encodings([batch_of(seed=1)])
    with pytest.raises(IntegerError, match=rf"{op} has no integer form; there are add, cat"):
        sim.integer_only()


def test_relu_has_one():
    sim = QuantSim(model_of("Bert", hidden_act="relu"), "ibert")
    sim.compute_encodings([batch_of(seed=1)])
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert (sim.integer_only("nonlinear").model(**batch_of()).logits - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    "spec, message",
    [({"bits": 16}, "symmetric weights of 8 bits or fewer"), ({"symmetric": False}, "symmetric weights of 8 bits or fewer")],
)
def test_weights_out_of_grid(spec, message):
    sim = QuantSim(model_of("Bert"), IBERT.with_rules(Rule(op="linear", role="weight", set=spec)))
    sim.compute_encodings([batch_of(seed=1)])
    with pytest.raises(IntegerError, match=message):
        sim.integer_only()


def test_weights_that_are_not_finite():
    sim = simulated("Bert")
    with torch.no_grad():
        sim.model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(IntegerError, match=r"classifier.weight: holds numbers that are not finite"):
        sim.integer_only()


def test_an_unknown_function_to_force():
    with pytest.raises(IntegerError, match=r"'tanh'; expected one of none, gelu, softmax, layernorm, nonlinear"):
        simulated("Bert").integer_only("tanh")


class TakesFloats(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.out = nn.Linear(8, 2)

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.out(features))


def test_a_model_of_floats():
    batch = {"features": torch.randn(4, 8)}
    sim = QuantSim(TakesFloats(BertConfig()).eval(), "ibert", batch)
    sim.compute_encodings([batch])
    with pytest.raises(IntegerError, match=r"features.*a floating-point input; an integer graph begins at embedding look-ups"):
        sim.integer_only()


# ---- training ----


@pytest.mark.parametrize("family", FAMILIES)
def test_training_form_and_integer_graph_agree_bit_for_bit(family):
    sim = simulated(family)
    for seed in range(3):
        batch = batch_of(3, 5 + 4 * seed, seed)
        with sim.integer_only_training():
            found = sim.model(**batch).logits
        assert found.requires_grad
        assert torch.equal(found, sim.integer_only().model(**batch).logits)


@pytest.mark.parametrize("family", BUILT_ON)
def test_they_agree_while_it_is_trained(family):
    sim = simulated(family)
    labels = torch.tensor([0, 1, 1, 0])
    sim.model.train()
    optimizer = torch.optim.AdamW([p for p in sim.model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    with sim.integer_only_training():
        for _ in range(8):
            loss = sim.model(**batch_of(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        trained = sim.model(**batch_of()).logits
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(trained, sim.integer_only().model(**batch_of()).logits)
    assert sim.model.forward.graph is sim.graph


def test_gradients_reach_everything_and_are_the_simulations_where_values_are():
    sim = simulated("Bert")

    def gradients(integers: bool) -> dict[str, Tensor]:
        sim.model.zero_grad()
        if integers:
            with sim.integer_only_training("nonlinear"):
                sim.model(**batch_of()).logits.square().sum().backward()
        else:
            sim.model(**batch_of()).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in sim.model.named_parameters() if p.requires_grad}

    ours, simulation = gradients(True), gradients(False)
    assert ours.keys() == simulation.keys()
    for name, g in simulation.items():
        if g.norm() > 1e-3:
            assert torch.cosine_similarity(ours[name].flatten(), g.flatten(), 0) > 0.95, name
            assert 0.8 < ours[name].norm() / g.norm() < 1.25, name


def test_weights_are_not_written_over():
    """A table of more than 8 bits is quantized where it stands by no one."""
    sim = QuantSim(tiny_bert(), IBERT.with_rules(Rule(op="embedding", role="weight", set={"bits": 12})))
    sim.compute_encodings([tiny_batch()])
    before = {name: x.clone() for name, x in sim.model.state_dict().items()}
    sim.integer_only()
    with sim.integer_only_training(), torch.no_grad():
        sim.model(**tiny_batch())
    assert all(torch.equal(x, before[name]) for name, x in sim.model.state_dict().items())
