"""Which ops of a simulation have exact sums, and what follows: the lowered model's values, on any batch and number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantsim import QuantConfig, QuantSim, Rule
from quantsim.quantizers.exact_linear import ExactLinear
from quantsim.quantizers.exact_matmul import ExactMatmul
from quantsim.quantizers.exact_softmax import ExactNorm, ExactSoftmax
from tests.tiny import HEADS, batch_for, tensors_of, tiny_batch, tiny_bert, tiny_sim


def exact(sim: QuantSim, kind: type[nn.Module] = ExactLinear) -> list[str]:
    return [name for name, module in sim.model.named_modules() if isinstance(module, kind)]


def test_every_linear_between_quantized_edges():
    sim = tiny_sim()
    linears = [f"exact.{name}.weight" for name, module in tiny_bert().named_modules() if isinstance(module, nn.Linear)]
    assert sorted(exact(sim)) == sorted(linears)
    assert not sim.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)


def test_both_products_of_every_attention():
    sim, at = tiny_sim(), "exact.bert.encoder.layer.{}.attention.self.{}.matmul"
    sides = ("query.output", "softmax")
    assert sorted(exact(sim, ExactMatmul)) == [at.format(i, side) for i in (0, 1) for side in sides]
    assert not sim.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    assert sorted(exact(tiny_sim(config="deploy"), ExactMatmul)) == sorted(exact(sim, ExactMatmul))


def test_every_softmax_and_norm_of_a_quantized_edge():
    sim, at = tiny_sim(), "exact.bert.encoder.layer.{}.{}.add.{}"
    assert sorted(exact(sim, ExactSoftmax)) == [at.format(i, "attention.self", "softmax") for i in (0, 1)]
    norms = [at.format(i, part, "layer_norm") for i in (0, 1) for part in ("attention.output", "output")]
    assert sorted(exact(sim, ExactNorm)) == ["exact.bert.embeddings.add_1.layer_norm", *sorted(norms)]
    assert exact(tiny_sim(config="deploy"), ExactSoftmax) == exact(tiny_sim(config="deploy"), ExactNorm) == []


def test_not_one_whose_input_has_16_bits():
    config = QuantConfig.preset("aimet").with_rules(Rule(module="*.layer.0.output.*", role="activation", set={"bits": 16}))
    assert len(exact(tiny_sim(config=config))) == len(exact(tiny_sim())) - 3  # layer 1's query, key and value read that edge


def test_state_dict_has_nothing_of_it():
    assert not [key for key in tiny_sim().model.state_dict() if key.startswith("exact")]


def test_follows_the_models_mode():
    sim = tiny_sim()
    assert not any(sim.model.get_submodule(name).training for name in exact(sim))
    assert all(sim.model.train().get_submodule(name).training for name in exact(sim))
    sim = QuantSim(tiny_bert().train())
    assert all(sim.model.get_submodule(name).training for name in exact(sim))


@torch.no_grad()
@pytest.mark.parametrize("preset", QuantConfig.presets())
@pytest.mark.parametrize("head", HEADS)
def test_exact_lowering_is_the_simulation_to_the_bit(preset, head):
    sim = tiny_sim(head, config=preset)
    lowered = sim.lower(exact=True).model
    for rows, length in ((4, 10), (1, 1), (3, 17)):
        batch = batch_for(head, rows, length, seed=rows)
        found = tensors_of(lowered(**batch))
        for name, x in tensors_of(sim.model(**batch)).items():
            assert torch.equal(found[name], x), name


@torch.no_grad()
def test_with_and_without_gradients_the_values_are_the_same():
    sim, batch = tiny_sim(), tiny_batch()
    expected = sim.model(**batch).logits
    with torch.enable_grad():
        found = sim.model(**batch).logits
    assert found.requires_grad
    assert torch.equal(found, expected)
