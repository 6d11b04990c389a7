"""Sensitivity: each score is that of a whole pass with one quantizer switched, and the culprit that was planted leads the list."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quantsim import QuantConfig, QuantSim, Rule, State
from quantsim.numerics.sqnr import sqnr_db
from quantsim.report.sensitivity import Mode, estimate_seconds, outputs_sqnr, sensitivity
from quantsim.report.walk import Batch, Walk, evaluating, everyone, nobody, outputs_of, quantizers_of
from tests.tiny import HEADS, LABELS, batch_for, tiny_batch, tiny_sim

BATCHES = [tiny_batch(4, 10, seed=1), tiny_batch(3, 7, seed=2)]
CULPRIT = "bert.encoder.layer.1.output.dense.output"
MODES: list[Mode] = ["alone_on", "alone_off"]


def logits_with(sim: QuantSim, on: Sequence[str], batches: Sequence[Batch] = BATCHES) -> list[Tensor]:
    """By switching states and running the model, as anyone would."""
    states = {name: q.state for name, q in sim.quantizers.items()}
    try:
        for name, q in sim.quantizers.items():
            q.state = states[name] if name in on else State.OFF
        with torch.no_grad():
            return [sim.model(**batch).logits for batch in batches]
    finally:
        for name, q in sim.quantizers.items():
            q.state = states[name]


def directly(sim: QuantSim, name: str, mode: Mode) -> float:
    """The SQNR of the logits, in float64."""
    reference = torch.cat(logits_with(sim, [])).double()
    on = [name] if mode == "alone_on" else [other for other in sim.quantizers if other != name]
    found = torch.cat(logits_with(sim, on)).double()
    return sqnr_db(reference.square().sum().item(), (reference - found).square().sum().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", ["aimet", "aimet_per_tensor", "bondarenko"])
def test_every_score_is_that_of_whole_passes(preset: str, mode: Mode) -> None:
    sim = tiny_sim(config=preset)
    found = dict(sensitivity(sim.graph, BATCHES, mode))
    assert list(found) == list(quantizers_of(sim.graph))
    assert set(found) == set(sim.quantizers)
    for name, score in found.items():
        assert score == pytest.approx(directly(sim, name, mode), abs=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_two_bits_lead_the_list(mode: Mode) -> None:
    config = QuantConfig.preset("aimet").with_rules(Rule(module=CULPRIT, set={"bits": 2}))
    sim = tiny_sim(config=config)
    scores = dict(sensitivity(sim.graph, BATCHES, mode))
    order = sorted(scores, key=scores.__getitem__)
    assert (order[0] if mode == "alone_on" else order[-1]) == CULPRIT


def test_nothing_of_the_model_is_changed() -> None:
    sim = tiny_sim()
    before = {name: x.clone() for name, x in sim.model.state_dict().items()}
    states = {name: q.state for name, q in sim.quantizers.items()}
    expected = logits_with(sim, list(sim.quantizers))
    sim.model.train()
    found = sensitivity(sim.graph, BATCHES, "alone_off")
    next(found)
    assert all(m.training for m in sim.graph.modules() if m is not sim.graph)
    found.close()
    list(sensitivity(sim.graph, BATCHES, "alone_on"))
    sim.model.eval()
    assert {name: q.state for name, q in sim.quantizers.items()} == states
    assert all(torch.equal(x, before[name]) for name, x in sim.model.state_dict().items())
    assert all(map(torch.equal, expected, logits_with(sim, list(sim.quantizers))))


def test_dropout_is_off_while_it_measures() -> None:
    sim = tiny_sim()
    expected = dict(sensitivity(sim.graph, BATCHES, "alone_on"))
    sim.model.train()
    assert dict(sensitivity(sim.graph, BATCHES, "alone_on")) == expected


def test_a_metric_sees_outputs_and_labels_of_every_batch() -> None:
    sim = tiny_sim()
    batches = [{**tiny_batch(4, seed=seed), "labels": LABELS} for seed in (1, 2)]

    def negative_loss(outputs: Sequence[dict[str, Tensor]], given: Sequence[Batch]) -> float:
        logits = torch.cat([output["logits"] for output in outputs])
        return -torch.nn.functional.cross_entropy(logits, torch.cat([batch["labels"] for batch in given])).item()

    scores = dict(sensitivity(sim.graph, batches, "alone_on", negative_loss))
    on = logits_with(sim, [CULPRIT], batches)
    expected = -torch.nn.functional.cross_entropy(torch.cat(on), torch.cat([LABELS, LABELS])).item()
    assert scores[CULPRIT] == pytest.approx(expected, abs=1e-7)


def test_padded_tokens_do_not_count() -> None:
    sim = tiny_sim("BertForTokenClassification")
    batch = tiny_batch(4, 10, seed=1)
    reference, found = (outputs_of(sim.graph, [batch], chosen)[0]["logits"].double() for chosen in (nobody, everyone))
    kept = batch["attention_mask"].bool()
    expected = sqnr_db(reference[kept].square().sum().item(), (reference - found)[kept].square().sum().item())
    metric = outputs_sqnr(outputs_of(sim.graph, [batch], nobody))
    assert metric(outputs_of(sim.graph, [batch]), [batch]) == pytest.approx(expected, abs=1e-9)
    whole = {name: x for name, x in batch.items() if name != "attention_mask"}
    assert metric(outputs_of(sim.graph, [batch]), [whole]) != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_a_walk_gives_what_the_model_gives(head: str) -> None:
    sim = tiny_sim(head)
    batch = batch_for(head)
    with torch.no_grad():
        expected = sim.model(**batch)
        with sim.quantizers_off():
            unquantized = sim.model(**batch)
    for name, x in outputs_of(sim.graph, [batch])[0].items():
        assert torch.equal(x, expected[name])
    for name, x in outputs_of(sim.graph, [batch], nobody)[0].items():
        assert torch.equal(x, unquantized[name])


def test_a_branch_leaves_the_walk_as_it_was() -> None:
    sim = tiny_sim()
    expected = outputs_of(sim.graph, BATCHES[:1], nobody)[0]["logits"]
    with torch.no_grad(), evaluating(sim.graph):
        walk = Walk(sim.graph, BATCHES[0], nobody)
        for position in quantizers_of(sim.graph).values():
            walk.advance(position)
            walk.branch(everyone).finish()
        assert torch.equal(walk.finish()["logits"], expected)


def test_a_graph_that_writes_into_tensors_starts_branches_at_the_beginning() -> None:
    class InPlace(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y.view(-1)
            y.add_(1)
            return z.sum()

    graph = torch.export.export(InPlace(), (torch.ones(3),)).module()
    with torch.no_grad():
        walk = Walk(graph, {str(n.target): torch.ones(3) for n in graph.graph.find_nodes(op="placeholder")}, nobody)
        assert walk.mutates
        walk.advance(len(walk.nodes) - 2)
        assert walk.branch(nobody).finish()["0"].item() == 9
        assert walk.finish()["0"].item() == 9


def test_an_estimate_is_positive_and_grows_with_rows() -> None:
    sim = tiny_sim()
    one = estimate_seconds(sim.graph, BATCHES[:1])
    assert 0 < one < 60
    assert estimate_seconds(sim.graph, BATCHES[:1] * 50) > one


def test_refusals() -> None:
    sim = tiny_sim()
    with pytest.raises(ValueError, match="no batches"):
        next(sensitivity(sim.graph, [], "alone_on"))
    with pytest.raises(ValueError, match=r"no quantizer 'bert.pooler'; the nearest are bert.pooler"):
        next(sensitivity(sim.graph, BATCHES, "alone_on", names=["bert.pooler"]))
    with pytest.raises(ValueError, match="the model also needs 'input_ids'"):
        next(sensitivity(sim.graph, [{"attention_mask": torch.ones(2, 3)}], "alone_on"))
