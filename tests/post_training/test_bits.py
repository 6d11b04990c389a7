"""The search for mixed precision: it finds what was planted, keeps to its budget, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantsim import ConfigError, QuantConfig, QuantSim, Rule
from tests.post_training.outliers import BATCHES, noise, sick_bert, simulate
from tests.tiny import tiny_sim

SUMS = {f"bert.encoder.layer.{i}.{part}output.add" for i in range(2) for part in ("attention.", "")}


@pytest.fixture(scope="module")
def sim() -> QuantSim:
    return simulate()


def raised(before: QuantConfig, after: QuantConfig) -> list[str]:
    assert after.rules[: len(before.rules)] == before.rules
    return [str(rule.module) for rule in after.rules[len(before.rules) :]]


def rebuilt(config: QuantConfig) -> QuantSim:
    sim = QuantSim(sick_bert(), config)
    sim.compute_encodings(BATCHES)
    return sim


def test_the_edges_with_outliers_come_first_and_raising_them_helps(sim: QuantSim) -> None:
    config = sim.search_bits(BATCHES[:1], edges=6)
    names = raised(sim.config, config)
    assert 3 <= len(names) <= 6
    assert names[0] in SUMS
    better = rebuilt(config)
    assert {name for name, q in better.quantizers.items() if q.spec.bits == 16} == set(names)
    assert noise(better) < 0.3 * noise(sim)


def test_greedy_in_one_step_is_the_best_single_edge(sim: QuantSim) -> None:
    """Against every edge tried by itself."""
    from quantsim.report.sensitivity import sensitivity

    (name,) = raised(sim.config, sim.search_bits(BATCHES[:1], edges=1))
    activations = [p.name for p in sim.placements if p.spec and p.role == "activation"]
    scores = dict(sensitivity(sim.graph, BATCHES[:1], "alone_off", names=activations))
    assert name == max(scores, key=lambda edge: scores[edge])


def test_the_average_width_is_kept_to(sim: QuantSim) -> None:
    better = rebuilt(sim.search_bits(BATCHES[:1], average=8.5))
    widths = [q.spec.bits for name, q in better.quantizers.items() if not name.endswith(".weight")]
    assert 8 < sum(widths) / len(widths) <= 8.5
    assert (sum(widths) + 8) / len(widths) > 8.5  # one more would be too many


def test_a_metric_of_the_callers_is_what_counts(sim: QuantSim) -> None:
    """It sees the labels, and edges that don't raise it are left."""
    batches = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in BATCHES[:1]]

    def metric(outputs: Any, given: Any) -> float:
        assert "labels" in given[0]
        return 1.0

    assert raised(sim.config, sim.search_bits(batches, edges=3, metric=metric)) == []


def test_nothing_of_the_simulation_changes(sim: QuantSim) -> None:
    before = {k: v.clone() for k, v in sim.model.state_dict().items()}
    sim.search_bits(BATCHES[:1], edges=2)
    assert all(torch.equal(before[k], v) for k, v in sim.model.state_dict().items())


def test_what_has_the_bits_already_is_no_candidate() -> None:
    sim = simulate(QuantConfig.preset("aimet").with_rules(Rule(op="add", role="activation", set={"bits": 16})))
    assert not SUMS & set(raised(sim.config, sim.search_bits(BATCHES[:1], edges=3)))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "expected one of the two"),
        ({"edges": 3, "average": 9.0}, "expected one of the two"),
        ({"edges": 0}, "edges: 0; expected 1 or more"),
        ({"average": 7.5}, r"average: 7.5 bits; the activations have 8\.00 as they are"),
        ({"edges": 1, "bits": 32}, "bits: 32"),
    ],
    ids=["none", "both", "no edges", "too low", "too wide"],
)
def test_budgets_that_mean_nothing_are_refused(budget: dict[str, Any], message: str, sim: QuantSim) -> None:
    with pytest.raises(ConfigError, match=message):
        sim.search_bits(BATCHES[:1], **budget)


def test_an_uncalibrated_simulation_is_refused() -> None:
    with pytest.raises(ConfigError, match="call compute_encodings first"):
        tiny_sim(calibrated=False).search_bits(BATCHES[:1], edges=1)
