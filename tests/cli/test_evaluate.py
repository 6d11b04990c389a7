"""`quantsim evaluate`: its figures are those that a user would compute by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoTokenizer, BertForSequenceClassification

from model_zoo.cards import Card
from quantsim import QuantSim
from quantsim.cli.command import CommandError
from quantsim.cli.scoring import own_task, with_class_numbers
from quantsim.quantizers.fake_quantizer import State
from recipes import bert_quanteval
from tests.cli.conftest import TEXTS, Run, save_model, write_csv
from tests.recipes.test_data import RTE, SQUAD, write_dataset
from tests.tiny import HEADS, tiny_bert, tiny_config

ROWS = [{"text": text + tail, "label": (len(text) + len(tail)) % 2} for tail in ("", " or not", " then") for text in TEXTS]
LABELS = [row["label"] for row in ROWS]


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("labelled") / "rows.csv", ROWS)


@torch.no_grad()
def logits_of(model: torch.nn.Module, folder: Path, length: int = 16) -> np.ndarray[Any, Any]:
    texts = [str(row["text"]) for row in ROWS]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return np.asarray(model.eval()(**batch).logits)


# ---- labelled ----


def test_a_checkpoint_against_its_floating_point_side(checkpoint: Path, model: Path, labelled: Path, run: Run) -> None:
    found = run("evaluate", checkpoint, "--data", labelled, "--max-length", 16, "--against", "float", "--json").json
    networks = [QuantSim.from_pretrained(checkpoint).model, BertForSequenceClassification.from_pretrained(model)]
    predictions = [logits_of(network, model).argmax(1) for network in networks]
    for report, said in zip(found["models"], predictions, strict=True):
        expected = {
            "accuracy": 100 * accuracy_score(LABELS, said),
            "f1": 100 * f1_score(LABELS, said),
            "matthews": 100 * matthews_corrcoef(LABELS, said),
        }
        assert report["metrics"] == pytest.approx(expected)
    assert [report["runs"] for report in found["models"]] == ["simulated", "float"]
    assert found["agreement"]["value"] == pytest.approx(100 * np.mean(predictions[0] == predictions[1]))
    first, second = (report["metrics"] for report in found["models"])
    assert found["difference"] == {name: first[name] - second[name] for name in first}
    assert found["data"]["rows"] == len(ROWS)


def test_the_table(checkpoint: Path, labelled: Path, run: Run) -> None:
    ran = run("evaluate", checkpoint, "--data", labelled, "--rows", 4, "--max-length", 16, "--against", "float")
    assert ran.code == 0
    assert "difference" in ran.out
    assert "| matthews" in ran.out
    assert "4 rows of" in ran.out


@pytest.mark.parametrize("backend", ["int8", "onnxruntime"])
def test_a_backend_predicts_as_the_simulation(backend: str, checkpoint: Path, labelled: Path, run: Run) -> None:
    found = run(
        "evaluate", checkpoint, "--data", labelled, "--max-length", 16, "--backend", backend, "--against", checkpoint, "--json"
    ).json
    assert [report["runs"] for report in found["models"]] == [backend, "simulated"]
    assert found["agreement"]["value"] >= 90


def test_regression(base: Path, tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", base, num_labels=1)
    path = write_csv(tmp_path / "rows.csv", [row | {"label": i / 3} for i, row in enumerate(ROWS)])
    found = run("evaluate", folder, "--data", path, "--max-length", 16, "--json").json
    scores = logits_of(BertForSequenceClassification.from_pretrained(folder), folder)[:, 0]
    assert found["models"][0]["metrics"]["pearson"] == pytest.approx(100 * np.corrcoef(scores, np.arange(len(ROWS)))[0, 1], rel=1e-4)
    assert found["kind"] == "regression"


def test_questions(base: Path, tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", base, HEADS["BertForQuestionAnswering"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SQUAD))
    found = run("evaluate", folder, "--data", path, "--json").json
    assert set(found["models"][0]["metrics"]) == {"f1", "exact_match"}
    assert found["data"]["rows"] == 2


def test_a_card_scores_as_the_recipes_evaluator(bundle: Card, tmp_path: Path, no_hub: None, run: Run) -> None:
    glue = write_dataset(tmp_path / "glue", "rte", {"train": RTE[:1], "validation": RTE})
    found = run("evaluate", bundle.folder, "--task", "rte", "--data", glue, "--against", "float", "--json").json
    flags = ["--model_config", "bert_w8a8_rte", "--checkpoint", str(bundle.folder), "--dataset", glue]
    assert bert_quanteval.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    theirs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["data"]["max_length"] == theirs["max_length"]
    assert found["rows_sha256"] == theirs["results"][0]["data"]["sha256"]
    assert [report["metrics"] for report in found["models"]] == [theirs["results"][0][side]["metrics"] for side in ("w8a8", "fp32")]
    assert found["agreement"] == theirs["results"][0]["agreement"]


# ---- labels ----


def rows_with(labels: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": "x", "label": label} for label in labels])


def test_names_of_classes_become_the_models_numbers() -> None:
    config = tiny_config(id2label={0: "yes", 1: "No"})
    assert with_class_numbers(rows_with(["no", "Yes", "no"]), "label", config, "rows")["label"][:] == [1, 0, 1]
    with pytest.raises(CommandError, match=r"row 1: label is 'maybe'; the model's classes are yes, no"):
        with_class_numbers(rows_with(["no", "maybe"]), "label", config, "rows")


def test_a_dataset_that_numbers_the_classes_otherwise() -> None:
    rows = rows_with([0, 1, 2]).cast_column("label", datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]))
    config = tiny_config(id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
    assert with_class_numbers(rows, "label", config, "rows")["label"][:] == [2, 1, 0]
    unnamed = tiny_config(num_labels=3)  # LABEL_0, LABEL_1, LABEL_2: numbers are all that there is
    assert with_class_numbers(rows, "label", unnamed, "rows")["label"][:] == [0, 1, 2]


def test_the_head_decides_the_metrics() -> None:
    assert own_task(tiny_bert(num_labels=3), ("text",), "label").metrics == ("accuracy", "matthews")
    assert own_task(tiny_bert(), ("text",), "label").metrics == ("accuracy", "f1", "matthews")
    with pytest.raises(CommandError, match="--unlabelled compares its outputs"):
        own_task(tiny_bert(HEADS["BertForMaskedLM"]), ("text",), "label")


# ---- unlabelled ----


@pytest.mark.parametrize(
    "head", ["BertForQuestionAnswering", "BertModel", pytest.param("BertForTokenClassification", marks=pytest.mark.slow)]
)
def test_outputs_of_any_head(head: str, base: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", base, HEADS[head])
    for bits in (8, 3):
        flags = ["--weight-bits", bits, "--activation-bits", bits, "--max-length", 16]
        assert run("quantize", folder, "--data", texts, "--output", tmp_path / str(bits), *flags).code == 0
    fine, coarse = (
        run("evaluate", tmp_path / name, "--unlabelled", "--data", texts, "--max-length", 16, "--json").json["outputs"] for name in "83"
    )
    assert set(fine) == set(coarse)
    assert all(fine[name]["sqnr_db"] > coarse[name]["sqnr_db"] + 10 for name in fine)
    decides = head != "BertModel"
    assert all((found["agreement_percent"] is not None) == decides for found in fine.values())


def test_a_model_against_itself(model: Path, texts: Path, run: Run) -> None:
    ran = run("evaluate", model, "--unlabelled", "--against", model, "--data", texts, "--max-length", 16, "--json")
    assert ran.json["outputs"] == {"logits": {"sqnr_db": None, "agreement_percent": 100.0}}


# ---- what it refuses ----


def test_an_uncalibrated_checkpoint(model: Path, labelled: Path, tmp_path: Path, run: Run) -> None:
    sim = QuantSim(BertForSequenceClassification.from_pretrained(model))
    assert all(quantizer.state is State.OFF for quantizer in sim.quantizers.values())
    shutil.copytree(model, tmp_path / "raw")
    sim.save_pretrained(tmp_path / "raw")
    for command in (
        ["evaluate", "--data", labelled],
        ["lower", "--output", tmp_path / "x"],
        ["export", "--format", "onnx", "--output", "x"],
    ):
        assert "no quantizer of it is calibrated" in run(command[0], tmp_path / "raw", *command[1:]).refused()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--label", "answer"], "no column 'answer'; name the one with the answers by --label (text, label)"),
        (["--columns", "label"], "expected text"),
        (["--backend", "int9"], "no such backend (nearest: int8)"),
        (["--backend", "int8"], "is not quantized; leave it out"),
        (["--against", "float"], "is not quantized, so it is compared with itself"),
        (["--unlabelled"], "is not quantized, so it is compared with itself"),
        (["--task", "stsb"], "no column 'sentence1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_refuses(flags: list[str], message: str, model: Path, labelled: Path, run: Run) -> None:
    assert message in run("evaluate", model, "--data", labelled, "--max-length", 16, *flags).refused()


def test_labels_that_the_model_does_not_have(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_csv(tmp_path / "rows.csv", [row | {"label": 7} for row in ROWS])
    assert "row 0: label is 7; expected an integer from 0 to 1" in run("evaluate", model, "--data", path).refused()


def test_a_backend_that_runs_on_the_cpu(checkpoint: Path, labelled: Path, run: Run) -> None:
    assert (
        "runs on the CPU; leave out --device meta"
        in run("evaluate", checkpoint, "--data", labelled, "--backend", "int8", "--device", "meta").refused()
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--split", "nonsense"], "is a file, so there is no --split nonsense to choose; leave it out"),
        (["--subset", "rte"], "is a file, so there is no --subset rte"),
    ],
    ids=["split", "subset"],
)
def test_flags_that_a_file_has_no_use_for(flags: list[str], message: str, model: Path, labelled: Path, run: Run) -> None:
    assert message in run("evaluate", model, "--data", labelled, *flags).refused()


def test_columns_and_label_in_place_of_the_tasks(model: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"first": text, "second": "a cat", "gold": i % 2} for i, text in enumerate(TEXTS)]
    data = write_csv(tmp_path / "rows.csv", rows)
    command = ["evaluate", model, "--task", "rte", "--data", data, "--max-length", 16, "--json"]
    assert run(*command, "--columns", "first", "second", "--label", "gold").json["data"]["columns"] == ["first", "second"]
    assert "sentence1" in run(*command).out  # the task's own are not there


def test_a_tasks_rows_compared_without_labels(model: Path, checkpoint: Path, tmp_path: Path, no_hub: None, run: Run) -> None:
    folder = write_dataset(tmp_path / "glue", "rte", {"validation": RTE})
    found = run("evaluate", checkpoint, "--unlabelled", "--task", "rte", "--data", folder, "--max-length", 16, "--json").json
    assert found["data"]["columns"] == ["sentence1", "sentence2"]


def test_answers_of_another_name() -> None:
    from transformers import BertForQuestionAnswering

    assert own_task(tiny_bert(BertForQuestionAnswering), ("question", "context"), "gold").label == "gold"
