"""Ranges that follow values: against the recurrence written out, in training and evaluation, from the first step."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantsim import ConfigError, IntegerError, QuantConfig, QuantSim, QuantSpec, Rule, State
from quantsim.graph.roles import op_of
from quantsim.quantizers.fake_quantizer import CalibrationError
from quantsim.quantizers.following import DynamicIntegers, FollowingQuantizer, FollowingWeightQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.report.lowering import lowered_edges
from tests.rewrites.integer_models import batch_of, model_of

EMA = QuantSpec(symmetric=True, learn=False, follow="ema", momentum=0.75, straight_through=True)
DYNAMIC = QuantSpec(symmetric=True, learn=False, follow="dynamic", straight_through=True)


def test_an_average_begins_with_the_first_tensor():
    quantizer = FollowingQuantizer(EMA)
    expected = None
    for seed in range(4):
        x = torch.randn(5, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        quantizer(x)
        expected = x.abs().max() if expected is None else 0.75 * expected + 0.25 * x.abs().max()
        torch.testing.assert_close(quantizer.max.detach(), expected)
        assert torch.equal(quantizer.min, -quantizer.max)
        assert quantizer.state is State.FOLLOWING


def test_an_asymmetric_range_follows_both_ends():
    quantizer = FollowingQuantizer(QuantSpec(learn=False, follow="ema", momentum=0.5))
    for low, high in ((-1.0, 3.0), (-2.0, 1.0)):
        quantizer(torch.tensor([low, high]))
    assert (float(quantizer.min), float(quantizer.max)) == (-1.5, 2.0)


def test_evaluation_freezes_an_average_and_nothing_else():
    average, own, weight = FollowingQuantizer(EMA), FollowingQuantizer(DYNAMIC), FollowingWeightQuantizer(DYNAMIC)
    for quantizer in (average, own, weight):
        quantizer(torch.tensor([1.0]))
        quantizer.eval()(torch.tensor([4.0]))
    assert (float(average.max), float(own.max), float(weight.max)) == (1.0, 4.0, 1.0)


def test_it_waits_for_its_step_and_passes_values_until_then():
    quantizer = FollowingQuantizer(QuantSpec(symmetric=True, bits=2, learn=False, follow="ema", start_step=3))
    x = torch.tensor([0.3, 0.7, 1.0])
    for step in range(3):
        assert torch.equal(quantizer(x), x)
        assert int(quantizer.steps) == step + 1
    assert torch.equal(quantizer.eval()(x), x)
    assert int(quantizer.steps) == 3  # evaluation does not count
    assert not torch.equal(quantizer.train()(x), x)


def test_the_count_is_in_the_state_dict():
    quantizer = FollowingQuantizer(QuantSpec(learn=False, follow="ema", start_step=3))
    quantizer(torch.ones(2))
    again = FollowingQuantizer(quantizer.spec)
    again.load_state_dict(quantizer.state_dict())
    assert (int(again.steps), again.state) == (1, State.WAITING)


def test_the_gradient_passes_where_values_are_clipped():
    quantizer = FollowingQuantizer(EMA)
    quantizer(torch.tensor([1.0]))
    quantizer.eval()
    x = torch.tensor([0.2, 5.0, -7.0], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0])
    found = quantizer(x)
    found.backward(g)
    assert torch.equal(x.grad, g)
    assert found.max() == 1.0
    clipping = FollowingQuantizer(QuantSpec(symmetric=True, learn=False, follow="ema"))
    clipping(torch.tensor([1.0]))
    clipping.eval()
    x.grad = None
    clipping(x).backward(g)
    assert torch.equal(x.grad, torch.tensor([1.0, 0.0, 0.0]))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(CalibrationError, match="expected ends and width to be finite"):
        FollowingQuantizer(EMA, "edge")(torch.tensor([1.0, torch.inf]))


@pytest.mark.parametrize("changes, field", [({"follow": "sometimes"}, "follow"), ({"start_step": -1}, "start_step")])
def test_a_spec_that_means_nothing(changes, field):
    with pytest.raises(ConfigError, match=f"QuantSpec.{field}"):
        QuantSpec(**changes)


def test_a_spec_without_it_is_written_as_before():
    assert set(QuantSpec().to_dict()) == {"bits", "symmetric", "axis", "estimator", "learn", "percentile", "momentum"}
    assert QuantSpec.from_dict(EMA.to_dict()) == EMA


# ---- preset q8bert ----


def trained() -> QuantSim:
    sim = QuantSim(model_of("Bert"), "q8bert")
    sim.model.train()
    for seed in range(2):
        sim.model(**batch_of(seed=seed), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    sim.model.eval()
    return sim


def test_it_quantizes_what_q8bert_does():
    sim = trained()
    quantized = {name for name in sim.quantizers if ".layer.0." in name}
    layer = "bert.encoder.layer.0."
    assert quantized == {
        *(f"{layer}attention.self.{x}.weight" for x in ("query", "key", "value")),
        *(f"{layer}attention.self.{x}.output" for x in ("query", "key")),
        *(f"{layer}{x}.dense.weight" for x in ("attention.output", "intermediate", "output")),
        *(f"{layer}{x}.LayerNorm.output" for x in ("attention.output", "output")),
        f"{layer}attention.self.matmul_1",
        f"{layer}intermediate.intermediate_act_fn.output",
    }
    head = {name for name, quantizer in sim.quantizers.items() if quantizer.state is State.WAITING}
    assert head == {"bert.pooler.activation.output", "classifier.weight"}


@pytest.mark.parametrize("name", ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"])
def test_a_residual_reads_what_is_not_quantized(name):
    """A norm's output, behind dropout where the model has one there: three linears or one read it in 8 bits, and a sum in float."""
    sim = trained()
    norm = next(p for p in sim.placements if p.name == f"bert.{name}.LayerNorm.output")
    readers, found = list(norm.node.users), []
    while readers:
        user = readers.pop()
        quantizer = quantizer_of(user, sim.graph)
        op = op_of(user, sim.graph)
        found.append(quantizer.name if quantizer else op)
        readers += user.users if op == "dropout" else []
    assert sorted(set(found) - {"dropout"}) == ["add", norm.name]
    assert not sim.quantizers[norm.name].overwrites


def test_nothing_moves_in_evaluation():
    sim = trained()
    before = copy.deepcopy(sim.model.state_dict())
    with torch.no_grad():
        sim.model(**{name: x * 1 for name, x in batch_of(seed=9).items()})
    assert all(torch.equal(x, before[name]) for name, x in sim.model.state_dict().items())


def test_weights_follow_every_step():
    sim = trained()
    name = "bert.pooler.dense.weight"
    with torch.no_grad():
        sim.model.get_parameter(name).mul_(3)
    sim.model(**batch_of())
    assert float(sim.quantizers[name].max) < float(sim.model.get_parameter(name).detach().abs().max())
    sim.model.train()(**batch_of())
    assert float(sim.quantizers[name].max) == float(sim.model.get_parameter(name).detach().abs().max())


def test_a_fresh_simulation_of_a_model_in_evaluation_moves_nothing():
    sim = QuantSim(model_of("Bert"), "q8bert")
    with torch.no_grad():
        expected = model_of("Bert")(**batch_of()).logits
        torch.testing.assert_close(sim.model(**batch_of()).logits, expected)
    assert {quantizer.state for quantizer in sim.quantizers.values()} == {State.WAITING}


def test_it_is_saved_and_lowered(tmp_path):
    sim = trained()
    sim.compute_encodings([batch_of(seed=5)])  # the head too
    sim.save_pretrained(tmp_path / "fp32")
    again = QuantSim.from_pretrained(tmp_path / "fp32")
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert torch.equal(again.model(**batch_of()).logits, expected)
        exact = sim.lower(exact=True)
        assert torch.equal(exact.model(**batch_of()).logits, expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "in kernels"])
def test_dynamic_ranges_stay_each_tensors_own_when_lowered(symmetric: bool, exact: bool):
    config = QuantConfig.preset("q8bert").with_rules(Rule(role="activation", set={"follow": "dynamic", "symmetric": symmetric}))
    sim = QuantSim(model_of("Bert"), config)
    sim.compute_encodings([batch_of(seed=5)])
    lowered = sim.lower(exact=exact)
    kernels = Counter(edge.kernel for edge in lowered_edges(lowered.graph))
    assert kernels["float32 linear"] == kernels["fake quantizer"] == 0, str(lowered)
    assert kernels["int8 product"] == 10  # query, key and value are one
    assert kernels["dynamic range"] == 14
    with torch.no_grad():
        for seed in range(3):
            batch = batch_of(seed=seed) if seed else {name: x[:, :5] for name, x in batch_of(seed=seed).items()}
            expected = sim.model(**batch).logits
            found = lowered.model(**batch).logits
            if exact:
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    with pytest.raises(IntegerError, match=r"each tensor's own \(dynamic\)"):
        sim.integer_only()


def test_a_dynamic_edge_before_fixed_ones():
    config = QuantConfig.preset("aimet").with_rules(Rule(op="layer_norm", role="activation", set={"follow": "dynamic", "learn": False}))
    sim = QuantSim(model_of("Bert"), config)
    sim.compute_encodings([batch_of(seed=5)])
    notes = [edge.note for edge in lowered_edges(sim.lower().graph) if edge.kernel == "int8 product"]
    assert any("range for each tensor" in note and "requantized" in note for note in notes), notes
    with torch.no_grad():
        expected = sim.model(**batch_of()).logits
        assert torch.equal(sim.lower(exact=True).model(**batch_of()).logits, expected)
        torch.testing.assert_close(sim.lower().model(**batch_of()).logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_integers_of_a_tensors_own_range_are_what_its_quantizer_computes():
    for symmetric in (True, False):
        spec = replace(DYNAMIC, symmetric=symmetric)
        quantizer = FollowingQuantizer(spec).eval()
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        for x in (torch.randn(7, 5), torch.zeros(3, 4), torch.tensor([[1e-40, -3.0]]), torch.rand(4, 4) + 5):
            q, scale, zero_point = DynamicIntegers(spec, "x")(x)
            assert q.dtype == (torch.int8 if symmetric else torch.uint8)
            assert torch.equal((q.float() - zero_point) * scale, quantizer(x))


def test_training_learns():
    sim = QuantSim(
        model_of("Bert"), QuantConfig.preset("q8bert").with_rules(Rule(module="classifier*", role="weight", set={"start_step": 3}))
    )
    optimizer = torch.optim.AdamW([p for p in sim.model.parameters() if p.requires_grad], lr=3e-3)
    sim.model.train()
    for module in sim.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for _ in range(12):
        loss = sim.model(**batch_of(), labels=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_calibration_sets_the_range_that_training_would() -> None:
    quantizer = FollowingQuantizer(QuantSpec(symmetric=True, follow="ema"))
    quantizer.set_range(torch.tensor(-4.0), torch.tensor(2.0))
    assert (quantizer.min.item(), quantizer.max.item()) == (-4.0, 4.0)
