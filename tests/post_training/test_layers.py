"""The walk side by side: biases get the mean error of their op, layer after layer, and parameters of others are left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertModel

from quantsim import PostTraining, QuantConfig, QuantSim
from quantsim.graph.roles import op_of
from quantsim.post_training.layers import adjust_layers, mean_error
from quantsim.report.walk import Walk, everyone, nobody
from tests.post_training.outliers import BATCHES, logits, noise, sick_bert, simulate

CLIPPED = replace(QuantConfig.preset("aimet"), activations=replace(QuantConfig.preset("aimet").activations, bits=6))  # type: ignore[type-var]


def outputs_of_node(sim: QuantSim, node: Any, chosen: Any) -> list[torch.Tensor]:
    found = []
    for batch in BATCHES:
        walk = Walk(sim.graph, batch, chosen)
        at = walk.nodes.index(node)
        walk.advance(at)
        found.append(walk.step()[1].clone())
    return found


def test_the_mean_error_leaves_padding_out() -> None:
    y, y_hat = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = (y.double() - y_hat.double())[mask.bool()].mean(0)
    torch.testing.assert_close(mean_error([y], [y_hat], [{"attention_mask": mask}]), expected)
    torch.testing.assert_close(mean_error([y], [y_hat], [{}]), (y.double() - y_hat.double()).mean((0, 1)))
    pooled = mean_error([y[:, 0]], [y_hat[:, 0]], [{"attention_mask": mask}])
    torch.testing.assert_close(pooled, (y - y_hat)[:, 0].double().mean(0))


@torch.no_grad()
def test_afterwards_no_linear_or_norm_has_a_mean_error() -> None:
    """All of them at once, for each was corrected with those before it corrected."""
    sim = simulate(CLIPPED)
    reference = simulate(CLIPPED)
    ops = ("linear", "layer_norm")
    nodes, same = ([n for n in s.graph.graph.nodes if op_of(n, s.graph) in ops] for s in (sim, reference))
    adjust_layers(sim.graph, BATCHES, biases=True)
    worst = {}
    for node, twin in zip(nodes, same, strict=True):
        exact = outputs_of_node(reference, twin, nobody)
        for name, s, n in (("before", reference, twin), ("after", sim, node)):
            errors = mean_error(exact, outputs_of_node(s, n, everyone), BATCHES)
            worst[name] = max(worst.get(name, 0.0), float(errors.abs().max()))
    assert worst["before"] > 0.01
    assert worst["after"] < 1e-5


def test_only_biases_change() -> None:
    sim, plain = simulate(), simulate()
    adjust_layers(sim.graph, BATCHES, biases=True)
    own = dict(plain.model.named_parameters())
    changed = {name for name, p in sim.model.named_parameters() if not torch.equal(p, own[name])}
    assert changed
    assert all(name.endswith(".bias") for name in changed)


def test_bias_correction_helps_a_model_with_outliers() -> None:
    assert noise(simulate(CLIPPED, bias_correction=True)) < 0.8 * noise(simulate(CLIPPED))


def test_layers_that_are_called_again_keep_their_parameters() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "embedding_size": 8}
    model = AlbertModel(AlbertConfig(vocab_size=99, **sizes)).eval()
    sim = QuantSim(model, replace(CLIPPED, post_training=PostTraining(adaround=5, bias_correction=True)))
    sim.compute_encodings(BATCHES)
    own = dict(model.named_parameters())
    changed = {name for name, p in sim.model.named_parameters() if name in own and not torch.equal(p, own[name])}
    assert "encoder.embedding_hidden_mapping_in.weight" in changed
    assert not any(".albert_layers." in name for name in changed)


@pytest.mark.parametrize("steps", [0, 5])
def test_the_mode_and_the_states_stay(steps: int) -> None:
    sim = simulate()
    sim.model.train()
    states = {name: q.state for name, q in sim.quantizers.items()}
    adjust_layers(sim.graph, BATCHES, rounding_steps=steps, biases=True)
    assert sim.model.training
    assert {name: q.state for name, q in sim.quantizers.items()} == states
    assert logits(sim.model.eval()).isfinite().all()
    assert sick_bert() is not sim.model
