"""`quantsim list` and `quantsim coverage`: nothing that there is is left out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from transformers import BertForSequenceClassification

from model_zoo.cards import find, names
from quantsim import QuantConfig, QuantSim
from quantsim.config import EstimatorName
from recipes.backends import BACKENDS
from recipes.tasks import TASKS
from tests.cli.conftest import Run


def test_list_names_all_that_there_is(run: Run) -> None:
    found = run("list", "--json").json
    assert found["presets"] == {name: QuantConfig.preset(name).to_dict() for name in QuantConfig.presets()}
    assert list(found["estimators"]) == list(get_args(EstimatorName))
    assert list(found["tasks"]) == list(TASKS)
    assert found["backends"] == list(BACKENDS)
    assert [card["name"] for card in found["cards"]] == names()
    rte = next(card for card in found["cards"] if card["name"] == "bert_w8a8_rte")
    assert rte["metrics"]["qat"] == find("bert_w8a8_rte").metrics["qat"]
    text = run("list").out
    for name in (*QuantConfig.presets(), *get_args(EstimatorName), *TASKS, *BACKENDS, *names()):
        assert f"\n{name}" in text


def test_coverage_of_a_model(model: Path, run: Run) -> None:
    sim = QuantSim(BertForSequenceClassification.from_pretrained(model), "bondarenko")
    assert run("coverage", model, "--preset", "bondarenko").out == f"{sim}\n"
    found = run("coverage", model, "--preset", "bondarenko", "--json").json
    assert [edge["edge"] for edge in found["edges"]] == [placement.name for placement in sim.placements]
    assert found["quantizers"] == len(sim.quantizers)
    assert all((edge["quantizer"] is None) == bool(edge["reason"]) for edge in found["edges"])


def test_coverage_of_a_checkpoint_has_its_ranges(checkpoint: Path, run: Run) -> None:
    sim = QuantSim.from_pretrained(checkpoint)
    found = run("coverage", checkpoint, "--json").json
    for edge in found["edges"]:
        if edge["quantizer"]:
            quantizer = sim.quantizers[edge["edge"]]
            assert edge["range"] == [quantizer.min.min().item(), quantizer.max.max().item()]
            assert edge["state"] == "learning"
        else:
            assert edge["range"] is None
