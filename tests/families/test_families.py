"""Families of encoders through the whole flow, and the table of docs/ against what was found.

One class of each family in every run, every class with save and load with ``-m slow``; ``python -m tests.families`` writes the table.
"""

from __future__ import annotations

import pytest
import torch

from quantsim import QuantSim
from quantsim.kernels import cpu
from tests.families.check import Case, batches, build, cases, check, every_edge_is_placed_or_excused, outputs
from tests.families.configs import FAMILIES, Family
from tests.families.table import MARKDOWN, excused, read_rows, row_of, to_markdown

COPIES = {"CamemBERT", "XLM-RoBERTa"}  # RoBERTa's code under another name: slow
EVERY_HEAD = {"BERT", "MobileBERT", "DeBERTa-v3"}  # a masked LM whose decoder is tied, joined of two matrices, of its own

NAMED = [family for family in FAMILIES if family.named]
FIRST = {family.name: cases(family)[0] for family in NAMED}
ALL = [case for family in NAMED for case in cases(family)]


def is_quick(case: Case) -> bool:
    family = case.family.name
    return family not in COPIES and (case.architecture == FIRST[family].architecture or (family in EVERY_HEAD and case.head == "masked LM"))


def parameters(found: list[Case]) -> list[pytest.param]:
    return [
        pytest.param(case, id=f"{case.family.name}-{case.architecture}", marks=[] if is_quick(case) else pytest.mark.slow) for case in found
    ]


def by_architecture(name: str) -> Case:
    return next(case for case in ALL if case.architecture == name)


@pytest.mark.parametrize("case", parameters(ALL))
def test_a_head_goes_through_the_flow(case: Case) -> None:
    found = check(case, reload=not is_quick(case) or case.head == "masked LM")  # the slow test of the table loads every class
    row = read_rows()[case.family.name]
    assert case.head in row.green
    if row.shown == case.architecture:
        assert (row.activations, row.weights, row.mask, row.excused) == (
            str(found.activations),
            str(found.weights),
            found.mask,
            excused(found),
        )


# ---- the table ----


def test_the_table_has_a_row_for_every_family_and_every_named_one_is_green() -> None:
    rows = read_rows()
    assert list(rows) == [family.name for family in FAMILIES]
    assert len(NAMED) >= 18
    for family in NAMED:
        offered = cases(family)
        assert rows[family.name].classes == f"{len(offered)}/{len(offered)}", rows[family.name].note
        assert rows[family.name].green == ", ".join(dict.fromkeys(case.head for case in offered))


def test_the_page_is_made_of_the_table() -> None:
    assert MARKDOWN.read_text() == to_markdown(read_rows().values())


def test_a_family_that_was_not_named_works_or_says_why() -> None:
    for family in FAMILIES:
        row = read_rows()[family.name]
        passed, of = row.classes.split("/")
        assert family.named or passed == of or row.note


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_the_table_is_what_a_run_gives(family: Family) -> None:
    assert row_of(family) == read_rows()[family.name]


def test_the_check_can_fail() -> None:
    """An edge that was forgotten is named by the walk over the graph."""
    case = by_architecture("BertModel")
    sim = QuantSim(build(case))
    sim.placements = [p for p in sim.placements if p.attention != "attention_scale" or p.spec is None]
    for node in list(sim.graph.graph.nodes):
        if node.op == "call_module" and node.target.endswith("attention.self.mul"):
            node.replace_all_uses_with(node.args[0])
    with pytest.raises(AssertionError, match=r"mul.*no placement names"):
        every_edge_is_placed_or_excused(sim)


# ---- lowered ----

LOWERED = ["AlbertForSequenceClassification", "MobileBertForMaskedLM", "DebertaV2ForSequenceClassification", "ViTForImageClassification"]
LOWERED_TOO = ["DebertaForSequenceClassification", "ModernBertForSequenceClassification", "MPNetModel", "IBertForMaskedLM", "DeiTModel"]


@pytest.mark.parametrize("exact_kernels", [True, False], ids=["int8", "float32"])
@pytest.mark.parametrize("name", [*LOWERED, *(pytest.param(name, marks=pytest.mark.slow) for name in LOWERED_TOO)])
@pytest.mark.filterwarnings("ignore:lower")
@pytest.mark.filterwarnings("ignore:.*is traced as it evaluates")
def test_lowered_it_computes_what_the_simulation_does(name: str, exact_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact_kernels:
        monkeypatch.setattr(cpu, "_missing_on_cpu", lambda: "the kernels saturate")
    case = by_architecture(name)
    model = build(case)
    sim = QuantSim(model)
    padded, short = batches(model, case.family.sees)
    sim.compute_encodings([padded, short])
    lowered = sim.lower()
    with torch.no_grad():
        expected, found = outputs(sim.model, padded), outputs(lowered.model, padded)
    for key, x in expected.items():
        ratio = 10 * torch.log10(x.square().sum() / (found[key] - x).square().sum())
        assert ratio > 25, f"{key}: {ratio:.1f} dB between kernels and simulation"
    assert "product" in str(lowered).splitlines()[0]
