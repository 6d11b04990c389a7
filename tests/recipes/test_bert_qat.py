"""The program from end to end, on a tiny base and made-up rows: what it writes is what the evaluator finds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from model_zoo.cards import read_card, verify, write_card
from model_zoo.publish import publish
from quantsim import CheckpointError
from recipes import bert_qat, bert_quanteval, measure_again
from recipes.bert_qat import in_folds
from recipes.tasks import TASKS, RecipeError

RECIPE: dict[str, Any] = {
    "name": "bert_w8a8_rte",
    "task": "rte",
    "max_length": 24,
    "rank": 2,
    "intermediate": [{"task": "mnli", "split": "validation_matched", "label_map": {0: 0, 1: 1, 2: 1}, "lr": 1e-2, "epochs": 1, "batch": 8}],
    "finetune": {"lr": 1e-2, "epochs": 2, "batch": 8},
    "quantization": {"calibration": {"rows": 8, "batch": 4}},
    "qat": {"lr": 1e-3, "epochs": 1, "batch": 8, "freeze_ranges_last": 0.5, "distillation": {"weight": 0.5}},
}


def rows(count: int, columns: tuple[str, str], labels: int) -> Dataset:
    words = ["a cat sat", "no dog ran far", "it rained", "they left the old house"]
    return Dataset.from_list(
        [{columns[0]: f"{words[i % 4]} {i // 2}", columns[1]: words[(i * 3 + 1) % 4], "label": i % labels, "idx": i} for i in range(count)]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A recipe and a dataset in the Hub's layout."""
    folder = tmp_path_factory.mktemp("files")
    splits = {
        "rte/train": rows(30, ("sentence1", "sentence2"), 2),
        "rte/validation": rows(11, ("sentence1", "sentence2"), 2),
        "mnli/validation_matched": rows(18, ("premise", "hypothesis"), 3),
    }
    configs: dict[str, list[dict[str, str]]] = {}
    for name, found in splits.items():
        config, split = name.split("/")
        (folder / "glue" / config).mkdir(parents=True, exist_ok=True)
        found.to_parquet(folder / "glue" / f"{name}.parquet")
        configs.setdefault(config, []).append({"split": split, "path": f"{name}.parquet"})
    header = {"configs": [{"config_name": name, "data_files": paths} for name, paths in configs.items()]}
    (folder / "glue" / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")
    (folder / "rte.yaml").write_text(yaml.safe_dump({**RECIPE, "base_model": str(base), "dataset": str(folder / "glue")}))
    return folder


def program(files: Path, folder: Path, *flags: str) -> int:
    return bert_qat.main(["--recipe", str(files / "rte.yaml"), "--output_dir", str(folder), "--offline", *flags])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Path:
    folder = tmp_path_factory.mktemp("output")
    assert program(files, folder) == 0
    return folder


def test_the_bundle_is_whole_and_names_no_place_on_this_machine(output: Path, files: Path) -> None:
    card = read_card(output / "bundle")
    verify(card)
    assert set(card.metrics) == {"fp32", "ptq", "qat"}
    assert {(values["rows"], values["split"]) for values in card.metrics.values()} == {(11, "validation")}
    assert card.hyper_parameters["qat"]["distillation"] == {"weight": 0.5, "temperature": 2.0}
    assert str(files.parent) not in (output / "bundle" / "card.json").read_text()
    assert "/tmp" not in (output / "bundle" / "config.json").read_text()


@pytest.mark.parametrize("batch", ["3", "8"])
def test_the_evaluator_finds_the_cards_figures(
    output: Path, files: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    for module in ("model_zoo.bundle", "recipes.artifacts"):
        monkeypatch.setattr(f"{module}.base_model_folder", lambda name: str(base))
    monkeypatch.setattr("model_zoo.bundle.load_float.__defaults__", (lambda name: str(base),))
    monkeypatch.setattr("model_zoo.bundle.load_simulation.__defaults__", (lambda name: str(base),))
    flags = ["--model_config", "bert_w8a8_rte", "--checkpoint", str(output / "bundle"), "--dataset", str(files / "glue"), "--offline"]
    assert bert_quanteval.main([*flags, "--per_device_eval_batch_size", batch, "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["results"][0]
    card = read_card(output / "bundle")
    assert found["fp32"]["metrics"]["accuracy"] == card.metrics["fp32"]["accuracy"]
    assert found["w8a8"]["metrics"]["accuracy"] == card.metrics["qat"]["accuracy"]


def test_measuring_again_finds_the_same_and_writes_it(
    output: Path, files: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("model_zoo.bundle", "recipes.artifacts"):
        monkeypatch.setattr(f"{module}.base_model_folder", lambda name: str(base))
    monkeypatch.setattr("model_zoo.bundle.load_float.__defaults__", (lambda name: str(base),))
    monkeypatch.setattr("model_zoo.bundle.load_simulation.__defaults__", (lambda name: str(base),))
    expected, bundle = read_card(output / "bundle"), tmp_path / "bundle"
    shutil.copytree(output / "bundle", bundle)
    wrong = {what: {**values, "accuracy": 1.0} for what, values in expected.metrics.items()}
    write_card(replace(expected, metrics=wrong, date="2001-01-01"), bundle)
    flags = ["--checkpoint", str(bundle), "--dataset", str(files / "glue"), "--offline"]
    assert measure_again.main([*flags, "--max_eval_rows", "3"]) == 2
    assert "--max_eval_rows 3: a card's figures are those of all rows" in capsys.readouterr().err
    assert measure_again.main(flags) == 0
    card = read_card(bundle)
    assert (card.metrics, card.estimators, card.files) == (expected.metrics, expected.estimators, expected.files)
    assert card.date > "2026"


def test_a_second_run_trains_nothing_again_and_other_settings_train_only_what_they_change(
    output: Path, files: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(output, again)
    assert program(files, again, "--stage", "qat") == 0
    assert read_card(output / "bundle").files == read_card(again / "bundle").files
    assert sorted(path.name.split("-")[0] for path in (again / "stages").iterdir()) == ["finetune", "mnli", "qat"]
    assert program(files, again, "--stage", "qat", "--qat.lr", "1e-4", "--qat.distillation", "null", "--qat.fused", "false") == 0
    assert sorted(path.name.split("-")[0] for path in (again / "stages").iterdir()) == ["finetune", "mnli", "qat", "qat"]
    assert len((again / "trials.jsonl").read_text().splitlines()) == 3


def test_qat_alone_needs_a_fine_tuned_model(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(files, tmp_path, "--stage", "qat") == 2
    assert "no finished mnli with these settings; run --stage fp32 first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--intermediate.0.label_map", "null"], ["--method", "full", "--intermediate", "null"]], ids=["new head", "full"]
)
def test_fp32_alone(files: Path, tmp_path: Path, flags: list[str]) -> None:
    assert program(files, tmp_path, "--stage", "fp32", "--fold", "1", "--folds", "3", *flags) == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert list(metrics) == ["fp32"]
    assert metrics["fp32"]["split"] == "fold 1 of 3 of train"


def test_publish_puts_the_bundle_in_place(output: Path, tmp_path: Path) -> None:
    card = read_card(output / "bundle")
    for _ in range(2):
        published = publish(card, tmp_path / "bundles")
    assert published.folder == tmp_path / "bundles" / "bert_w8a8_rte"
    assert published.to_dict() == card.to_dict()
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["bert_w8a8_rte"]


@pytest.mark.parametrize("broken", ["w8a8.safetensors", "metrics", "fold"])
def test_what_its_card_does_not_describe_is_not_published(output: Path, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(output / "bundle", folder)
    values = json.loads((folder / "card.json").read_text())
    if broken == "metrics":
        values["metrics"]["ptq"] = {}
    elif broken == "fold":
        values["metrics"]["qat"]["split"] = "fold 0 of 5 of train"
    else:
        (folder / broken).write_bytes(b"x" + (folder / broken).read_bytes()[1:])
    (folder / "card.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match={"metrics": "holds no figures", "fold": "without --fold"}.get(broken, "sha256")):
        publish(read_card(folder), tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists() or not list((tmp_path / "bundles").iterdir())


def test_folds_keep_a_premise_together() -> None:
    task = TASKS["rte"]
    found = rows(60, ("sentence1", "sentence2"), 2).map(lambda row, i: {"sentence1": f"premise {i // 3}"}, with_indices=True)
    seen: list[int] = []
    for fold in range(4):
        outside, inside = in_folds(found, task, 4, fold)
        assert not set(outside["sentence1"]) & set(inside["sentence1"])
        assert len(outside) + len(inside) == 60
        seen += inside["idx"]
    assert sorted(seen) == list(range(60))
    with pytest.raises(RecipeError, match="--fold 4: expected 0 to 3"):
        in_folds(found, task, 4, 4)


def test_a_teacher_is_trained_once_and_its_copies_are_learned_from(files: Path, base: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((files / "rte.yaml").read_text())
    recipe |= {"intermediate": [], "teacher": {"base_model": str(base), "edited_copies": 2, "finetune": RECIPE["finetune"]}}
    (tmp_path / "rte.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--recipe", str(tmp_path / "rte.yaml"), "--output_dir", str(tmp_path / "output"), "--offline"]
    assert bert_qat.main(flags) == 0
    stages = {path.name.split("-")[0]: path for path in (tmp_path / "output" / "stages").iterdir()}
    assert set(stages) == {"teacher", "taught", "finetune", "qat"}
    steps = {name: json.loads((stages[name] / "log.jsonl").read_text().splitlines()[-1])["step"] for name in ("teacher", "finetune")}
    assert steps == {"teacher": 8, "finetune": 24}  # 30 rows, then 90, in batches of 8, twice
    assert str(base) not in (tmp_path / "output" / "bundle" / "card.json").read_text()
    written = (stages["taught"] / "teacher.safetensors").stat().st_mtime_ns
    assert bert_qat.main([*flags, "--stage", "fp32", "--finetune.lr", "1e-3", "--teacher.distillation.weight", "0.5"]) == 0
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "output" / "stages").iterdir()) == sorted([*stages, "finetune"])
    assert (stages["taught"] / "teacher.safetensors").stat().st_mtime_ns == written
    assert bert_qat.main([*flags, "--stage", "fp32", "--teacher.edited_copies", "0"]) == 0
    without = [json.loads(path.read_text().splitlines()[-1])["step"] for path in tmp_path.glob("**/stages/finetune-*/log.jsonl")]
    assert min(without) == 8  # the rows alone


@pytest.mark.parametrize(("kernels", "precision"), [(True, "bf16"), (False, "no")])
def test_a_cpu_without_bf16_kernels_trains_in_float32_and_says_so(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernels: bool, precision: str
) -> None:
    monkeypatch.setattr(bert_qat, "multiplies_bf16", lambda device: kernels)
    assert program(files, tmp_path, "--stage", "fp32", "--max_steps", "1") == 0
    written = json.loads((tmp_path / "results.json").read_text())["recipe"]
    assert [written["finetune"]["mixed_precision"], written["intermediate"][0]["mixed_precision"]] == [precision] * 2
    assert ("no bf16 kernels; training in float32" in capsys.readouterr().err) == (precision == "no")


@pytest.mark.parametrize("flag", ["--max_steps", "--eval_batch_size", "--max_train_rows", "--save_steps"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_are_from_1(flag: str, value: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No training of 0 steps that is kept as a trained model."""
    with pytest.raises(SystemExit):
        bert_qat.main(["--recipe", str(files / "rte.yaml"), flag, value])
    assert f"'{value}'; expected a whole number from 1" in capsys.readouterr().err
