"""Where quantizers go: golden lists, the published counts, rules, supergroups, axes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantsim import ConfigError, Placement, QuantConfig, QuantSim, QuantSpec, Rule, clamp_mask, place, trace
from quantsim.graph.place import FROM_IDS
from tests.tiny import HEADS, tiny_bert, tiny_graph, tiny_sim

GOLDEN = Path(__file__).parent / "golden"
PRESETS = QuantConfig.presets()


def placed(config: QuantConfig | str = "aimet", layers: int = 2) -> list[Placement]:
    """What ``QuantSim`` would place in a sequence classifier."""
    config = QuantConfig.preset(config) if isinstance(config, str) else config
    graph = tiny_graph(layers)
    if config.mask_clamp is not None:
        clamp_mask(graph, config.mask_clamp)
    return place(graph, config)


def quantized(placements: list[Placement], role: str = "activation") -> list[str]:
    return [p.name for p in placements if p.spec is not None and p.role == role]


def find(placements: list[Placement], name: str) -> Placement:
    (found,) = [p for p in placements if p.name == name]
    return found


def with_rules(*rules: Rule, preset: str = "aimet") -> list[Placement]:
    return placed(QuantConfig.preset(preset).with_rules(*rules))


# ---- the presets ----


@pytest.mark.parametrize("preset", ["aimet", "bondarenko"])
def test_golden_placement(preset: str) -> None:
    """One line an edge. A change here changes every published figure: read the difference before you copy it."""
    lines = [f"{p.role:<10} {p.name:<62} {p.spec or '-- ' + p.reason}" for p in placed(preset)]
    assert lines == (GOLDEN / f"{preset}.txt").read_text().splitlines()


def test_the_default_is_aimet() -> None:
    assert [(p.name, p.spec) for p in tiny_sim(calibrated=False).placements] == [(p.name, p.spec) for p in placed("aimet")]


@pytest.mark.parametrize(("preset", "per_layer", "more"), [("aimet", 16, 6), ("aimet_per_tensor", 16, 6), ("bondarenko", 13, 5)])
@pytest.mark.parametrize("layers", [2, 12])
def test_number_of_activation_quantizers(preset: str, per_layer: int, more: int, layers: int) -> None:
    placements = placed(preset, layers)
    assert len(quantized(placements)) == per_layer * layers + more
    assert len(quantized(placements, "weight")) == 3 + 1 + 8 * layers + 2  # embeddings, their norm, 6 linears and 2 norms, pooler, head


def test_bondarenko_has_161_activation_quantizers_on_bert_base() -> None:
    assert len(quantized(placed("bondarenko", layers=12))) == 161


@pytest.mark.parametrize("head", HEADS)
def test_every_edge_without_a_quantizer_says_why(head: str) -> None:
    placements = tiny_sim(head, calibrated=False).placements
    left = [p for p in placements if p.spec is None]
    assert left
    assert all(p.reason for p in left)
    assert all(p.reason == "" for p in placements if p.spec is not None)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_are_unique(preset: str) -> None:
    counts = Counter(p.name for p in placed(preset))
    assert [name for name, count in counts.items() if count > 1] == []


def test_masks_and_positions_are_never_quantized() -> None:
    placements = with_rules(Rule(role="activation", enabled=True))
    from_ids = [p for p in placements if p.reason == FROM_IDS]
    assert from_ids
    assert all(p.spec is None for p in from_ids)


# ---- attention roles ----


@pytest.mark.parametrize(
    ("role", "op"),
    [
        ("attention_scores", "matmul"),
        ("attention_scale", "mul"),
        ("mask_add", "add"),
        ("attention_probs", "softmax"),
        ("attention_context", "matmul"),
    ],
)
def test_each_layer_has_one_edge_of_each_attention_role(role: str, op: str) -> None:
    found = [p for p in placed() if p.attention == role]
    assert [p.op for p in found] == [op, op]
    assert [p.name.startswith(f"bert.encoder.layer.{i}.attention.self.") for i, p in enumerate(found)] == [True, True]


def test_residual_adds_are_no_mask_adds() -> None:
    assert find(placed(), "bert.encoder.layer.0.output.add").attention == "residual"


# ---- weights ----


def test_linear_weights_have_a_range_per_output_channel_and_the_others_one() -> None:
    for p in placed():
        if p.role == "weight":
            assert p.spec is not None
            assert p.spec.axis == (0 if p.op == "linear" else None), p.name
            assert p.spec.symmetric == (p.op != "layer_norm"), p.name


def test_an_axis_for_all_weights_leaves_vectors_with_one_range() -> None:
    specs = {p.op: p.spec for p in placed(QuantConfig()) if p.role == "weight"}
    assert {op: spec.axis for op, spec in specs.items()} == {"embedding": 0, "linear": 0, "layer_norm": None}


def test_weights_may_stay_in_floating_point() -> None:
    placements = placed(QuantConfig(weights=None))
    assert quantized(placements, "weight") == []
    assert len(quantized(placements)) > 0
    assert find(placements, "classifier.weight").reason == "weights are left as they are"


def test_activations_may_stay_in_floating_point() -> None:
    placements = placed(QuantConfig(activations=None))
    assert quantized(placements) == []
    assert find(placements, "classifier.output").reason == "activations are left as they are"


# ---- rules ----


def test_a_module_pattern_matches_what_it_names_and_nothing_else() -> None:
    before, after = placed(), with_rules(Rule(module="bert.encoder.layer.1.*", set={"bits": 4}))
    for a, b in zip(before, after, strict=True):
        inside = a.name.startswith("bert.encoder.layer.1.") and a.spec is not None
        assert b.spec == (Rule(op="x", set={"bits": 4}).apply(a.spec) if inside else a.spec), a.name


def test_an_op_and_a_role_must_both_match() -> None:
    placements = with_rules(Rule(op="linear", role="weight", set={"bits": 4}))
    assert {p.op for p in placements if p.spec and p.spec.bits == 4} == {"linear"}
    assert {p.role for p in placements if p.spec and p.spec.bits == 4} == {"weight"}


def test_a_rule_may_name_an_attention_role() -> None:
    placements = with_rules(Rule(op="mask_add", set={"bits": 16}))
    assert [p.attention for p in placements if p.spec and p.spec.bits == 16] == ["mask_add", "mask_add"]


@pytest.mark.parametrize("bits", [(4, 16), (16, 4)], ids=["4 then 16", "16 then 4"])
def test_later_rules_win(bits: tuple[int, int]) -> None:
    placements = with_rules(*(Rule(op="gelu", set={"bits": b}) for b in bits))
    assert {p.spec.bits for p in placements if p.op == "gelu" and p.spec} == {bits[1]}


def test_a_later_rule_changes_only_the_fields_it_sets() -> None:
    placements = with_rules(Rule(op="gelu", set={"bits": 4}), Rule(op="gelu", set={"symmetric": True}))
    assert {p.spec for p in placements if p.op == "gelu"} == {QuantSpec(bits=4, symmetric=True)}


def test_what_a_rule_switches_off_a_later_one_switches_on() -> None:
    off = Rule(op="softmax", enabled=False, reason="for the test")
    on = Rule(module="*.layer.1.*", op="softmax", enabled=True)
    softmax = [p for p in with_rules(off, on) if p.op == "softmax"]
    assert [p.spec is None for p in softmax] == [True, False]
    assert [p.reason for p in softmax] == ["for the test", ""]
    assert all(p.spec is None for p in with_rules(on, off) if p.op == "softmax")


def test_switching_off_without_a_reason_names_the_rule() -> None:
    p = find(with_rules(Rule(module="classifier.output", enabled=False)), "classifier.output")
    assert "classifier.output" in p.reason


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        (Rule(module="bert.encoder.layer.0.output.dens.weight", enabled=False), "bert.encoder.layer.0.output.dense.weight"),
        (Rule(op="softmx", enabled=False), "softmax"),
        (Rule(op="add", role="weight", enabled=False), "add"),
        (Rule(role="input", enabled=False), "no edge of role input"),
    ],
    ids=["module", "op", "op of another role", "role"],
)
def test_a_rule_that_matches_nothing_is_answered_with_the_nearest(rule: Rule, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)matches nothing.*{near}"):
        with_rules(rule)


def test_an_optional_rule_may_match_nothing() -> None:
    assert with_rules(Rule(op="conv2d", enabled=False, optional=True)) is not None


def test_an_axis_of_changing_size_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"classifier\.output: axis 0 has no fixed size"):
        with_rules(Rule(module="classifier.output", set={"axis": 0}))


@pytest.mark.parametrize(("name", "axis"), [("classifier.weight", 2), ("classifier.output", -3)])
def test_an_axis_that_is_not_there_is_refused_by_name(name: str, axis: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: axis {axis} of a tensor with 2 axes"):
        with_rules(Rule(module=name, set={"axis": axis}))


# ---- supergroups ----


def left_inside(*groups: tuple[str, ...]) -> list[str]:
    """What these supergroups leave without a quantizer that had one."""
    before = quantized(placed(QuantConfig()))
    after = quantized(placed(QuantConfig(supergroups=groups)))
    assert set(after) <= set(before)
    return [name for name in before if name not in after]


def test_a_supergroup_keeps_the_last_output_alone() -> None:
    assert left_inside(("linear", "gelu")) == [f"bert.encoder.layer.{i}.intermediate.dense.output" for i in (0, 1)]


def test_a_supergroup_runs_past_dropout_and_over_three_ops() -> None:
    expected = [f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.output.dense.output", "attention.output.add")]
    found = left_inside(("linear", "add", "layer_norm"))
    assert [name for name in found if ".attention.output." in name] == expected
    assert len(found) == 8


def test_an_output_with_another_user_is_not_fused() -> None:
    """LayerNorm's output feeds a linear and a residual add, but for the last one's, of which the pooler alone takes a slice."""
    assert left_inside(("layer_norm", "linear")) == ["bert.encoder.layer.1.output.LayerNorm.output"]


def test_ops_in_another_order_are_no_supergroup() -> None:
    assert left_inside(("gelu", "tanh"), ("add", "linear")) == []


# ---- values that are hidden outside an attention ----


@pytest.mark.parametrize("how", ["add", "fill", "where"])
def test_logits_that_a_mask_hides_have_no_grid(how: str) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.word, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            logits, hidden = self.head(self.word(input_ids)), (input_ids < 5)[..., None]
            if how == "add":
                return {"logits": logits + hidden.float() * torch.finfo(torch.float32).min}
            if how == "fill":
                return {"logits": logits.masked_fill(hidden, -1e9)}
            return {"logits": torch.where(hidden, -torch.inf, logits).clamp(min=-3e38)}

    placements = place(trace(Hides().eval(), {"input_ids": torch.randint(0, 20, (2, 6))}), QuantConfig.preset("aimet"))
    hidden = [p for p in placements if p.attention == "hidden_values"]
    assert [p.reason for p in hidden] == ["some of its values are hidden behind a large number"]
    assert find(placements, "head.output").spec is not None


def test_a_weight_that_is_switched_on_again_has_the_axis_that_it_would_have_had() -> None:
    graph = tiny_graph()
    config = QuantConfig.preset("ibert").with_rules(Rule(op="layer_norm", role="weight", enabled=True))
    norms = [p for p in place(graph, config) if p.role == "weight" and p.op == "layer_norm"]
    assert norms
    assert all(p.spec is not None and p.spec.axis is None for p in norms)  # a range for each number would quantize nothing
    off_and_on = [Rule(role="weight", enabled=False), Rule(op="embedding", role="weight", enabled=True)]
    tables = [p for p in place(graph, QuantConfig.preset("aimet").with_rules(*off_and_on)) if p.role == "weight" and p.op == "embedding"]
    assert {p.spec.axis for p in tables if p.spec is not None} == {None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activations_before": ("lineer",)}, "activations_before: 'lineer' is no op; .*linear"),
        ({"supergroups": (("linear", "gleu"),)}, "'gleu'.*gelu"),
    ],
    ids=["activations_before", "supergroups"],
)
def test_ops_that_are_mistyped_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(tiny_graph(), replace(QuantConfig.preset("aimet"), **changes))


def test_a_tied_weight_has_the_most_bits_that_were_asked_for() -> None:
    config = QuantConfig.preset("aimet").with_rules(Rule(op="linear", role="weight", set={"bits": 4}))
    sim = QuantSim(tiny_bert(HEADS["BertForMaskedLM"]), config)
    bits = {p.name: p.spec.bits for p in sim.placements if p.role == "weight" and p.spec is not None}
    tied = {p.name for p in sim.placements if p.role == "weight" and p.op == "embedding"} & {
        p.name for p in sim.placements if p.role == "weight" and p.op == "linear"
    }
    assert {bits[name] for name in tied} == {8}
    assert 4 in bits.values()
