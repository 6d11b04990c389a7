"""I-BERT and Q8BERT begin with a card's model, train it in its low-rank form, and leave a bundle that says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model_zoo import cards
from model_zoo.bundle import load_float, load_simulation, load_trainable, read_delta
from model_zoo.cards import Card, read_card, verify
from model_zoo.format import FP32, W8A8
from quantsim import find_floats
from recipes import ibert_finetune, q8bert
from recipes.base_model import base_state
from recipes.low_rank import low_rank_delta
from recipes.reading import read_recipe
from tests.tiny import tiny_batch

COMMON: dict[str, Any] = {"task": "rte", "max_length": 24, "finetune": {"lr": 1e-2, "epochs": 1, "batch": 16, "mixed_precision": "no"}}
QAT: dict[str, Any] = {"lr": 1e-3, "epochs": 1, "batch": 16, "fused": False, "distillation": {"weight": 0.5}}
CALIBRATION = {"rows": 8, "batch": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "ibert_rte": {**COMMON, "qat": QAT, "quantization": {"preset": "ibert", "calibration": CALIBRATION, "compare_estimators": []}},
    "q8bert_rte": {**COMMON, "qat": QAT, "quantization": {"preset": "q8bert", "calibration": CALIBRATION, "compare_estimators": []}},
}
FROM_CARD = Path(q8bert.__file__).parent / "from_card"
SMALL = ["--max_train_samples", "48", "--max_eval_samples", "16", "--offline"]


@pytest.fixture
def zoo(bundle: Card, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo that holds the tiny bundle alone."""
    monkeypatch.setattr(cards, "BUNDLES", bundle.folder.parent)
    return bundle.folder.parent


@pytest.fixture
def trained(zoo: Path, bundle: Card, tmp_path: Path) -> Callable[[str], Path]:
    def run(name: str) -> Path:
        path, folder = tmp_path / f"{name}.yaml", tmp_path / "runs" / name
        path.write_text(yaml.safe_dump({**RECIPES[name], "name": name, "base_model": bundle.base_model["name"]}))
        common = ["--recipe", str(path), "--model_name_or_path", bundle.name, "--output_dir", str(folder), *SMALL]
        if name == "ibert_rte":
            assert ibert_finetune.main([*common, "--stage", "integer"]) == 0
        else:
            assert q8bert.main([*common, "--do_train"]) == 0
        return folder

    return run


def test_the_card_s_model_to_train_is_the_card_s_model(bundle: Card) -> None:
    batch = tiny_batch(seed=1)
    model = load_trainable(bundle)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, load_float(bundle)(**batch).logits)
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    assert any(name.endswith(".up") for name in trainable)
    assert not any("embeddings.weight" in name or name.endswith(".original") for name in trainable)
    delta = low_rank_delta(model, base_state(bundle.base_model["name"], 2))
    held = read_delta(bundle.folder / FP32)
    assert {name for name in delta if ".low_rank." not in name} == set(held.whole)
    for name, (up, down) in held.low_rank.items():
        torch.testing.assert_close(delta[f"{name}.low_rank.up"], up.float())
        torch.testing.assert_close(delta[f"{name}.low_rank.down"], down.float())


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_bundle_is_as_small_as_the_card_s_and_holds_what_was_measured(trained: Callable[[str], Path], bundle: Card, name: str) -> None:
    folder = trained(name)
    card = read_card(folder / "bundle")
    verify(card)
    assert (card.name, card.quantization["activations"]["symmetric"]) == (name, True)
    before, after = (read_delta(found.folder / W8A8) for found in (bundle, card))
    assert set(after.low_rank) == set(before.low_rank)
    assert any(not torch.equal(up.half(), before.low_rank[key][0].half()) for key, (up, _) in after.low_rank.items())
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    last = "integer" if name == "ibert_rte" else "q8bert"
    assert card.metrics["qat"]["accuracy"] == metrics[last]["accuracy"]
    assert card.metrics["fp32"]["accuracy"] == metrics["fp32"]["accuracy"]


def test_the_integers_of_a_bundle_are_its_card_s(trained: Callable[[str], Path], bundle: Card) -> None:
    base, folder = bundle.base_model["name"], trained("ibert_rte")
    card = read_card(folder / "bundle")
    assert card.backend == "integers"
    assert find_floats(load_simulation(card, lambda _: base).integer_only().graph, tiny_batch(seed=1)) == []
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["integer"]["equal_to_training_form"] == metrics["integer"]["rows"] == 16


def test_a_card_s_model_is_trained_on_integers_alone(zoo: Path, bundle: Card, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "rte", "--stage", "integer", "--model_name_or_path", bundle.name, "--force_dequant", "gelu"]
    assert ibert_finetune.main(flags) == 2
    assert "--force_dequant gelu: a card's model is trained on integers alone" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(FROM_CARD.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_from_a_card_is_one(path: Path) -> None:
    recipe = read_recipe(path)
    scheme, _, task = path.stem.rpartition("_")
    assert (recipe.name, recipe.task, recipe.quantization.preset) == (path.stem, task, scheme)
