"""The parity harness: silent where both graphs agree, and loud at the edge where an error was planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantsim import LoweredModel, Parity, QuantConfig, QuantSim, Rule, compare_lowered, lower_int8
from quantsim.kernels.edges import to_integers
from quantsim.kernels.int8_linear import Int8Linear
from tests.tiny import tiny_batch, tiny_sim

BATCHES = [tiny_batch(8, 12, seed=seed) for seed in range(4)]
DENSE = "bert.encoder.layer.0.attention.output.dense.weight"
NORM = "bert.encoder.layer.1.attention.output.LayerNorm.output"


def compare(sim: QuantSim, lowered: LoweredModel) -> Parity:
    return compare_lowered(sim.graph, lowered.graph, BATCHES)


def product(lowered: LoweredModel, weight: str = DENSE) -> Int8Linear:
    return next(m for m in lowered.graph.modules() if isinstance(m, Int8Linear) and m.outputs[0].weight == weight)


def negate_logits(lowered: LoweredModel) -> None:
    """Let every row predict otherwise."""
    graph = lowered.graph.graph
    node = graph.output_node().args[0]
    with graph.inserting_before(node):
        node.kwargs = {"logits": graph.call_function(torch.neg, (node.kwargs["logits"],))}
    lowered.graph.recompile()


def worst(parity: Parity) -> list[str]:
    return [edge.name for edge in parity.edges if edge.off_by_more]


@pytest.mark.parametrize("preset", QuantConfig.presets())
def test_agreement(preset):
    sim = tiny_sim(config=preset)
    parity = compare(sim, sim.lower())
    assert parity.holds
    assert sum(edge.off_by_one for edge in parity.edges) <= sum(edge.values for edge in parity.edges) * 1e-4
    assert all(not edge.largest_difference > 1e-2 for edge in parity.edges)
    assert {edge.name for edge in parity.edges} == {p.name for p in sim.placements if p.spec and p.role == "activation"}
    assert parity.rows == 32
    assert parity.differing_rows == 0


def test_a_scale_off_by_one_percent_is_seen_at_its_edge():
    sim = tiny_sim()
    lowered = sim.lower()
    product(lowered).weight_scale.mul_(1.01)
    parity = compare(sim, lowered)
    seen = {edge.name: edge for edge in parity.edges}["bert.encoder.layer.0.attention.output.dense.output"]
    assert seen.off_by_one + seen.off_by_more > 100
    assert seen.largest_difference > 0.5
    others = [edge for edge in parity.edges if edge is not seen]
    assert sum(edge.off_by_one + edge.off_by_more for edge in others) < 5


def test_an_output_scale_off_by_one_percent_is_seen():
    sim = tiny_sim()
    lowered = sim.lower()
    node = next(n for n in lowered.graph.graph.find_nodes(op="call_function", target=to_integers) if n.meta["edge"] == NORM)
    node.update_arg(1, node.args[1] * 1.01)
    lowered.graph.recompile()
    seen = {edge.name: edge for edge in compare(sim, lowered).edges}[NORM]
    assert seen.off_by_one > 100


def test_a_zero_point_off_by_one_is_seen_at_its_edge():
    sim = tiny_sim()
    lowered = sim.lower()
    planted = product(lowered)
    out = planted.outputs[0]
    planted.give([replace(out, grid=replace(out.grid, zero_point=out.grid.zero_point + 1))])
    parity = compare(sim, lowered)
    seen = {edge.name: edge for edge in parity.edges}["bert.encoder.layer.0.attention.output.dense.output"]
    assert seen.off_by_one > 0.9 * seen.values


def test_an_input_zero_point_off_by_one_is_seen():
    sim = tiny_sim()
    lowered = sim.lower()
    planted = product(lowered)
    planted.grid = replace(planted.grid, zero_point=planted.grid.zero_point + 1)
    assert not compare(sim, lowered).holds


def test_a_transposed_weight_is_seen():
    sim = tiny_sim()
    lowered = sim.lower()
    planted = product(lowered)
    turned = Int8Linear(planted.integers().T.contiguous(), planted.weight_scale, planted.bias, planted.grid, planted.packs)
    planted.weight = turned.weight
    parity = compare(sim, lowered)
    assert worst(parity) == ["bert.encoder.layer.0.attention.output.dense.output"]
    assert not parity.holds
    assert "off by more" in str(parity)


def test_an_edge_whose_quantizer_stayed_is_compared_with_what_went_into_it():
    sim = tiny_sim(config=QuantConfig.preset("aimet").with_rules(Rule(op="layer_norm", role="activation", set={"bits": 16})))
    parity = compare(sim, sim.lower())
    norms = [edge for edge in parity.edges if edge.name.endswith("LayerNorm.output")]
    assert norms
    assert all(edge.largest_difference < 0.1 for edge in norms)


def test_rows_whose_tokens_differ_are_counted():
    sim = tiny_sim("BertForTokenClassification")
    lowered = sim.lower()
    negate_logits(lowered)
    parity = compare(sim, lowered)
    assert parity.differing_rows == parity.rows == 32
    logits = torch.cat([sim.model(**batch).logits for batch in BATCHES])
    assert parity.largest_margin == (logits[..., 0] - logits[..., 1]).abs().max().item()


def test_the_margin_of_rows_that_predict_otherwise():
    sim = tiny_sim()
    lowered = sim.lower()
    negate_logits(lowered)
    parity = compare(sim, lowered)
    assert parity.differing_rows > 16
    assert parity.largest_margin > 0
    assert "predict otherwise, the margin" in str(parity)


def test_the_noise_of_two_correct_computations():
    sim = tiny_sim()
    other = lower_int8(sim.graph, sim.placements, packs=False)
    parity = compare_lowered(sim.graph, sim.lower().graph, BATCHES, other)
    assert parity.noise is not None
    assert parity.noise < 0.1
    assert parity.noisy_rows == 0
    assert "requantization noise" in str(parity)
