"""The coverage table names every edge, its range once it has one, and the reason where it has none."""

from __future__ import annotations

import pytest

from tests.tiny import HEADS, tiny_sim


@pytest.mark.parametrize("head", HEADS)
def test_every_placement_has_a_line_with_its_spec_or_its_reason(head: str) -> None:
    sim = tiny_sim(head, calibrated=False)
    lines = {line.split()[0]: line for line in str(sim).splitlines() if line}
    for p in sim.placements:
        assert p.name in lines
        assert (str(p.spec) if p.spec else p.reason) in lines[p.name]


def test_states_and_ranges_are_shown() -> None:
    sim = tiny_sim()
    lines = {line.split()[0]: line for line in str(sim).splitlines() if line}
    q = sim.quantizers["classifier.output"]
    assert f"[{q.min.item():.4g}, {q.max.item():.4g}]" in lines["classifier.output"]
    assert "learning" in lines["classifier.output"]
    assert "32 ranges in" in lines["bert.encoder.layer.0.intermediate.dense.weight"]
    sim.freeze_ranges()
    assert " fixed " in next(line for line in str(sim).splitlines() if line.startswith("classifier.output "))


def test_before_calibration_every_quantizer_is_shown_off() -> None:
    sim = tiny_sim(calibrated=False)
    lines = {line.split()[0]: line for line in str(sim).splitlines() if line}
    assert all(lines[name].split("  ")[-1].strip() == "off" or " off" in lines[name] for name in sim.quantizers)


def test_the_counts_add_up() -> None:
    sim = tiny_sim(calibrated=False)
    weights = sum(p.role == "weight" for p in sim.placements)
    left = sum(p.spec is None for p in sim.placements)
    first = str(sim).splitlines()[0]
    assert (
        first == f"{weights} weight quantizers, {len(sim.quantizers) - weights} activation quantizers, {left} edges left in floating point"
    )
    assert first in repr(sim)
    assert "BertForSequenceClassification, aimet" in repr(sim)


def test_what_needs_no_quantizer_is_counted() -> None:
    text = str(tiny_sim(calibrated=False))
    assert "edges keep the grid of their input: " in text
    assert "19 biases are not quantized" in text  # 6 linears and 2 norms a layer, the embeddings' norm, pooler, classifier
