"""Post-training methods on the command line: each flag is what the library does, what is refused, and what a config file says itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from quantsim import PostTraining, QuantConfig, QuantSim, Rule
from quantsim.graph.roles import RESIDUAL
from tests.cli.conftest import TEXTS, Run, names_in

AIMET = QuantConfig.preset("aimet")


def batch_of(folder: Path) -> dict[str, Any]:
    texts = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    return dict(texts)


def by_hand(folder: Path, config: QuantConfig) -> QuantSim:
    sim = QuantSim(BertForSequenceClassification.from_pretrained(folder), config)
    sim.compute_encodings([batch_of(folder)])
    return sim


def asked(**post_training: Any) -> QuantConfig:
    return replace(AIMET, post_training=PostTraining(**post_training))


def residual(**changes: Any) -> QuantConfig:
    return AIMET.with_rules(Rule(op=RESIDUAL, role="activation", set=changes))


FLAGS = {
    "smooth": (["--smooth", "0.5"], asked(smooth=0.5)),
    "adaround": (["--adaround", "5"], asked(adaround=5)),
    "bias_correction": (["--bias-correction"], asked(bias_correction=True)),
    "groups": (["--residual-groups", "3"], residual(axis=-1, groups=3)),
    "bits": (["--residual-bits", "16"], residual(bits=16)),
    "together": (["--smooth", "0", "--bias-correction"], asked(smooth=0.0, bias_correction=True)),
}


@pytest.mark.parametrize(
    ("flags", "config"),
    [pytest.param(*given, id=name, marks=[pytest.mark.slow] if name in ("groups", "together") else []) for name, given in FLAGS.items()],
)
def test_a_flag_is_what_the_library_does(flags: list[str], config: QuantConfig, model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    ran = run("quantize", model, "--data", texts, "--max-length", 16, *flags, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    sim, expected = QuantSim.from_pretrained(tmp_path / "out"), by_hand(model, config)
    assert sim.config == config
    state, other = sim.model.state_dict(), expected.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], x) for name, x in other.items())
    with torch.no_grad():
        logits = expected.model(**batch_of(model)).logits
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(**batch_of(model)).logits, logits)


def test_a_search_gives_the_edges_that_it_names_more_bits(model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    command = ["quantize", model, "--data", texts, "--max-length", 16, "--activation-bits", 4, "--search-edges", 2]
    found = run(*command, "--output", tmp_path / "a", "--json").json
    sim = QuantSim.from_pretrained(tmp_path / "a")
    assert [name for name, q in sim.quantizers.items() if q.spec.bits == 16] == sorted(
        found["searched_edges"], key=list(sim.quantizers).index
    )
    assert len(found["searched_edges"]) == 2
    coarse = replace(AIMET, activations=replace(AIMET.activations, bits=4))  # type: ignore[type-var]
    assert sim.config == by_hand(model, coarse).search_bits([batch_of(model)], edges=2)
    text = run(*command, "--output", tmp_path / "b").out
    assert all(f"16 bits: {name}\n" in text for name in found["searched_edges"])


def test_what_a_config_file_asks_for_stays(model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "own.json").write_text(json.dumps(asked(smooth=0.5).to_dict()))
    flags = ["--preset", tmp_path / "own.json", "--bias-correction"]
    found = run("quantize", model, "--data", texts, "--max-length", 16, *flags, "--output", tmp_path / "out", "--json").json
    assert found["config"]["post_training"] == {"smooth": 0.5, "bias_correction": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smooth", "1.5"], "argument --smooth: '1.5'; expected a number from 0 to 1"),
        (["--smooth", "much"], "argument --smooth: 'much'"),
        (["--adaround", "0"], "argument --adaround: '0'; expected a whole number from 1"),
        (["--residual-groups", "999"], "999 groups; expected at most as many as axis -1 is long"),
        (["--residual-bits", "99"], "QuantSpec.bits: 99"),
        (["--search-edges", "-1"], "argument --search-edges: '-1'"),
    ],
)
def test_what_means_nothing_is_refused(flags: list[str], message: str, model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    assert message in run("quantize", model, "--data", texts, *flags, "--output", tmp_path / "out").refused()
    assert names_in(tmp_path) == set()
