"""Recipe files: every shipped one is read, every mistake names its field, every field can be overridden."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantsim import ConfigError, QuantConfig, QuantSpec
from recipes.bert_qat import overrides, parse
from recipes.reading import build, read_recipe
from recipes.recipe import Recipe
from recipes.tasks import MODEL_CONFIGS, RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "base_model": "base",
    "task": "rte",
    "intermediate": [{"task": "mnli", "lr": 1e-3, "epochs": 1, "batch": 4, "label_map": {0: 0, 1: 1, 2: 1}}],
    "finetune": {"lr": 1e-3, "epochs": 1, "batch": 4},
    "qat": {"lr": 1e-4, "epochs": 1, "batch": 4},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_read(path: Path) -> None:
    recipe = read_recipe(path)
    from_a_card = path.parent.name == "from_card"  # they are named as the card that they make
    assert recipe.name == (path.stem if from_a_card else f"{path.parent.name}_{path.stem}")
    assert recipe.quantization.config().name


def test_defaults(file: Path) -> None:
    recipe = read_recipe(file)
    assert (recipe.method, recipe.rank, recipe.max_length) == ("low_rank", 16, 128)
    assert (recipe.qat.weight_decay, recipe.qat.hidden_dropout, recipe.qat.mixed_precision) == (0.0, 0.0, "no")
    assert recipe.quantization.config() == QuantConfig.preset("aimet")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qat.lrr", "1", r"qat\.lrr: no such field; nearest: qat\.lr\b"),
        ("finetunee", "1", "finetunee: no such field; nearest: finetune"),
        ("intermediate.0.epoch", "1", r"intermediate\.0\.epoch: no such field; nearest: intermediate\.0\.epochs"),
        ("intermediate.1.lr", "1", "intermediate has the places 0 to 0, not '1'"),
        ("seed.x", "1", "seed is .* and has no fields|seed: "),
        ("finetune.batch", "1.5", r"finetune\.batch: 1\.5; expected a value of type int"),
        ("finetune.epochs", "true", r"finetune\.epochs: True; expected a value of type float"),
        ("finetune.epochs", "0", r"finetune\.epochs: 0\.0; expected a number above 0"),
        ("finetune.lr", "fast", r"finetune\.lr: 'fast'; expected a value of type float"),
        ("finetune.lr", "0", r"finetune\.lr: 0\.0; expected a number above 0"),
        ("finetune.warmup_ratio", "2", r"finetune\.warmup_ratio: 2\.0; expected a number from 0 to 1"),
        ("finetune.mixed_precision", "fp8", r"finetune\.mixed_precision: 'fp8'; expected one of bf16, no"),
        ("qat.accumulate", "3", r"qat\.accumulate: 3; expected a divisor of batch, which is 4"),
        ("qat.distillation.temperature", "-1", r"qat\.distillation\.temperature: -1\.0"),
        ("finetune", "null", "finetune: None; expected the fields lr, "),
        ("intermediate", "mnli", "intermediate: 'mnli'; expected a list"),
        ("quantization.calibration.estimator", "max", r"quantization\.calibration\.estimator: 'max'; expected one of min_max"),
    ],
)
def test_mistakes_name_their_field(file: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(file, {name: value})


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"qat\.batch: missing"):
        build(Recipe, {**SMALL, "qat": {"lr": 1, "epochs": 1}})
    with pytest.raises(RecipeError, match=r"absent\.yaml: not readable as YAML"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(RecipeError, match="expected the fields name, base_model"):
        read_recipe(tmp_path / "empty.yaml", {"seed": "1"})


def test_flags_override_fields(file: Path) -> None:
    flags = "--qat.lr 1e-5 --seed=7 --dataset folder --intermediate.0.epochs 2 --qat.distillation.weight .25 --method full"
    recipe, args = parse(["--recipe", str(file), *flags.split(), "--fold", "2", "--max_steps", "5"])
    assert (recipe.qat.lr, recipe.seed, recipe.dataset, recipe.intermediate[0].epochs, recipe.method) == (1e-5, 7, "folder", 2, "full")
    assert recipe.qat.distillation is not None
    assert recipe.qat.distillation.weight == 0.25
    assert (args.fold, args.folds, args.max_steps, args.stage, args.device) == (2, 5, 5, "all", "cpu")


def test_calibration_sets_the_estimators(file: Path) -> None:
    flags = {"quantization.calibration.estimator": "mse", "quantization.calibration.weight_estimator": "sqnr", "intermediate": "null"}
    recipe = read_recipe(file, flags)
    config = recipe.quantization.config()
    assert config.activations is not None
    assert config.weights is not None
    assert (config.activations.estimator, config.weights.estimator) == ("mse", "sqnr")
    assert recipe.intermediate == ()


@pytest.mark.parametrize(
    "words", [["qat.lr", "1"], ["--qat.lr"], ["--qat.lr", "--seed", "1"]], ids=["no flag", "no value", "a flag for a value"]
)
def test_flags_without_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"as --qat\.lr 1e-5"):
        overrides(words)


def test_every_config_has_its_recipe() -> None:
    quantized = [path for path in RECIPES if path.parent.name.startswith("bert_")]
    found = {path.parent.name + "_" + path.stem for path in quantized}
    assert set(MODEL_CONFIGS) <= found
    assert {f"bert_{bits}_{task}" for bits in ("w4a8", "w8a16") for task in ("rte", "stsb")} <= found
    for path in quantized:
        recipe = read_recipe(path)
        bits = re.fullmatch(r"bert_w(\d+)a(\d+)", path.parent.name)
        assert bits is not None
        config = recipe.quantization.config()
        assert config.weights is not None
        assert config.activations is not None
        assert (config.weights.bits, config.activations.bits) == (int(bits[1]), int(bits[2]))
        assert recipe.task == path.stem


def test_a_recipe_extends_another(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.yaml").write_text("extends: ../small.yaml\nname: more\nqat: {lr: 7.0e-4}\nintermediate: []\n")
    whole, more = read_recipe(file), read_recipe(tmp_path / "other" / "more.yaml", {"qat.epochs": "2"})
    assert more == replace(whole, name="more", intermediate=(), qat=replace(whole.qat, lr=7e-4, epochs=2.0))


@pytest.mark.parametrize(
    ("text", "message"), [("extends: a.yaml", "leads back to this file"), ("extends: none.yaml", r"none\.yaml: not readable")]
)
def test_a_circle_and_a_missing_base_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "a.yaml")


def test_bits_and_estimators_reach_the_config(file: Path) -> None:
    changes = {"quantization.weight_bits": "4", "quantization.calibration.weight_estimator": "mse", "quantization.activation_bits": "16"}
    quantization = read_recipe(file, changes).quantization
    config = quantization.config("sqnr")
    assert config.weights == QuantSpec(bits=4, symmetric=True, axis=0, estimator="mse")
    assert config.activations == QuantSpec(bits=16, estimator="sqnr")
    with pytest.raises(ConfigError, match="bits"):
        read_recipe(file, {"quantization.weight_bits": "40"}).quantization.config()


def test_delay_and_freezing_leave_steps_to_learn_in(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"qat\.delay: 0\.7 and freeze_ranges_last: 0\.4 leave no step"):
        read_recipe(file, {"qat.delay": "0.7", "qat.freeze_ranges_last": "0.4"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_in_float32_has_no_stage_in_bf16(path: Path) -> None:
    recipe = read_recipe(path).in_float32()
    assert "bf16" not in repr(recipe)
    assert recipe == recipe.in_float32()
