"""The evaluator from its command line to its table and ``results.json``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import torch

from model_zoo import cards
from model_zoo.cards import Card
from quantsim import QuantSim
from recipes import bert_quanteval
from recipes.bert_quanteval import Arguments, main, parse
from recipes.tasks import MODEL_CONFIGS, TASKS
from tests.model_zoo.loopback import Server
from tests.model_zoo.tiny_bundle import LINEAR, make_bundle
from tests.recipes.test_data import RTE, write_dataset
from tests.tiny import tiny_batch, tiny_bert

ROOT = Path(__file__).resolve().parents[2]


def evaluate(bundle: Card | Path, out: Path, *flags: str, config: str = "bert_w8a8_rte") -> int:
    folder = bundle.folder if isinstance(bundle, Card) else bundle
    return main(["--model_config", config, "--checkpoint", str(folder), "--output_dir", str(out), *flags])


@pytest.fixture
def glue(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "glue", "rte", {"validation": RTE})


# ---- it works ----


def test_the_command_of_the_readme(bundle: Card, tmp_path: Path) -> None:
    """In a process of its own, on the sample, with the model config alone once the zoo has the bundle."""
    command = [sys.executable, str(ROOT / "recipes" / "bert_quanteval.py"), "--model_config", "bert_w8a8_rte"]
    command += ["--per_device_eval_batch_size", "4", "--max_eval_samples", "12", "--checkpoint", str(bundle.folder)]
    hidden = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| own sample \| accuracy +\| +[\d.]+ \| +[\d.]+ \| +[+-][\d.]+ \| +[\d.]+ % \| +12 \|", done.stdout), done.stdout
    assert "NOT THE BENCHMARK" in done.stdout
    assert "NOT GLUE" in done.stderr
    assert "FP32 sample: 100%" in done.stderr
    assert "W8A8 sample: 100%" in done.stderr
    assert (tmp_path / "evaluation_result" / "results.json").is_file()


def test_results_hold_everything(bundle: Card, glue: str, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(bundle, tmp_path / "a" / "b", "--dataset", glue, "--seed", "7") == 0
    written = json.loads((tmp_path / "a" / "b" / "results.json").read_text())
    (result,) = written["results"]
    assert result["data"]["rows"] == 3
    assert (result["data"]["kind"], result["data"]["split"]) == ("dataset", "validation")
    for model in ("fp32", "w8a8"):
        assert round(result[model]["metrics"]["accuracy"] * 3 / 100, 6) in (0, 1, 2, 3)
        assert result[model]["seconds"] > 0
    assert result["difference"]["accuracy"] == pytest.approx(result["w8a8"]["metrics"]["accuracy"] - result["fp32"]["metrics"]["accuracy"])
    assert written["checkpoint"]["sha256"]["w8a8.safetensors"] == bundle.files["w8a8.safetensors"]["sha256"]
    assert written["quantization"] == bundle.quantization
    assert written["seed"] == 7
    assert written["max_length"] == bundle.hyper_parameters["max_length"]
    assert {"quantsim", "torch", "transformers", "datasets", "python"} <= set(written["versions"])
    out = capsys.readouterr().out
    assert bundle.base_model["name"] in out
    assert f"FP32 accuracy {bundle.metrics['fp32']['accuracy']:.2f} on 277 rows" in out


def test_twice_the_same_figures(bundle: Card, glue: str, tmp_path: Path, no_hub: None) -> None:
    found = []
    for batch in ("1", "3"):
        assert evaluate(bundle, tmp_path / batch, "--dataset", glue, "--per_device_eval_batch_size", batch) == 0
        (result,) = json.loads((tmp_path / batch / "results.json").read_text())["results"]
        found.append((result["fp32"]["metrics"], result["w8a8"]["metrics"], result["data"]["sha256"]))
    assert found[0] == found[1]


def test_a_folder_of_save_pretrained(base: Path, glue: str, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    sim = QuantSim(tiny_bert())
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path / "saved")
    assert evaluate(tmp_path / "saved", tmp_path / "out", "--dataset", glue) == 2  # the default tokenizer has 30,522 tokens
    assert "the model 99; put the files of the right tokenizer" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "saved" / name)
    assert evaluate(tmp_path / "saved", tmp_path / "out", "--dataset", glue) == 0
    out = capsys.readouterr().out
    assert "own weights, unquantized" in out
    assert "padded to 64 tokens" in out


def test_mnli_reports_its_splits_apart(base: Path, tmp_path: Path, no_hub: None) -> None:
    bundle = make_bundle(tmp_path / "bert_w8a8_mnli", base, "bert_w8a8_mnli", "mnli", num_labels=3)
    rows = [{"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": i} for i, row in enumerate(RTE)]
    both = write_dataset(tmp_path / "both", "mnli", {"validation_matched": rows, "validation_mismatched": rows[:2]})
    assert evaluate(bundle, tmp_path / "out", "--dataset", both, config="bert_w8a8_mnli") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [(result["data"]["split"], result["data"]["rows"]) for result in results] == [
        ("validation_matched", 3),
        ("validation_mismatched", 2),
    ]


def test_one_of_mnli_s_splits_is_enough_and_the_other_is_named(tmp_path: Path, no_hub: None) -> None:
    rows = [{"premise": "Bob ran.", "hypothesis": "Bob moved.", "label": 0}]
    one = write_dataset(tmp_path / "one", "mnli", {"validation_matched": rows})
    found, missing = bert_quanteval._load_splits(TASKS["mnli"], Arguments(dataset=one))
    assert [source.split for _, source in found] == ["validation_matched"]
    assert missing == ["validation_mismatched"]


def test_stsb_is_regression(base: Path, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bert_w8a8_stsb", base, "bert_w8a8_stsb", "stsb", num_labels=1)
    data = write_dataset(tmp_path / "glue", "stsb", {"validation": [row | {"label": 1.5 * row["idx"]} for row in RTE]})
    assert evaluate(bundle, tmp_path / "out", "--dataset", data, config="bert_w8a8_stsb") == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(result["fp32"]["metrics"]) == {"pearson", "spearman"}
    assert result["agreement"]["kind"] == "mean absolute difference"
    assert "mean |Δ|" in capsys.readouterr().out


def test_list_needs_nothing_else(bundle: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cards, "BUNDLES", bundle.folder.parent)
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in MODEL_CONFIGS)
    assert "published, from" in out
    assert out.count("not published") == 8


def test_a_checkpoint_from_a_url_and_then_from_the_cache(
    bundle: Card, server: Server, glue: str, tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = server.publish(bundle.folder, "zoo")
    flags = ["--model_config", "bert_w8a8_rte", "--checkpoint", place, "--dataset", glue, "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--offline"]) == 2
    assert not server.requests
    for module in (huggingface_hub.constants, datasets.config):  # what --offline set for the process
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    assert main(flags) == 0
    server.requests.clear()
    assert main([*flags, "--offline"]) == 0
    assert not server.requests
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["checkpoint"]["sha256"]["w8a8.safetensors"] == bundle.files["w8a8.safetensors"]["sha256"]


def test_defaults_are_aimet_s() -> None:
    arguments = parse(["--model_config", "bert_w8a8_rte"])
    assert (arguments.per_device_eval_batch_size, arguments.max_eval_samples, arguments.offline) == (8, None, False)


# ---- it refuses ----


def refusal(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a refusal: one paragraph, no traceback."""
    assert code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model_config is missing; give one of bert_w8a8_rte," in refusal(main([]), capsys)


def test_an_unknown_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model config 'bert_w8a8_rtee'; nearest: bert_w8a8_rte," in refusal(main(["--model_config", "bert_w8a8_rtee"]), capsys)


def test_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(main(["--model_config", "bert_w8a8_rte", "--datasett", "x"]), capsys)
    assert "no flag '--datasett' (nearest: --dataset)" in message


@pytest.mark.parametrize("flag", ["--per_device_eval_batch_size", "--max_eval_samples"])
def test_a_number_that_makes_no_sense(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} 0: expected 1 or more" in refusal(main(["--model_config", "bert_w8a8_rte", flag, "0"]), capsys)


def test_not_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cards, "BUNDLES", tmp_path)
    message = refusal(main(["--model_config", "bert_w8a8_rte"]), capsys)
    assert "not published yet" in message
    assert "train it with `python recipes/bert_qat.py --recipe recipes/bert_w8a8/rte.yaml`" in message


@pytest.mark.parametrize("name", [name for name in cards.names() if name not in cards.published()])
def test_recipe_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = name.replace("bert_w8a8_", "recipes/bert_w8a8/")
    command = f"train it with `python recipes/bert_qat.py --recipe {recipe}.yaml`"
    assert refusal(main(["--model_config", name]), capsys) == f"error: {name}: recipe only: {cards.find(name).note}, {command}"


def test_no_such_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(evaluate(tmp_path / "no", tmp_path), capsys)
    assert "no such folder, no Hub id (owner/name) or URL, and no published checkpoint" in message
    assert "holds neither card.json" in refusal(evaluate(tmp_path, tmp_path), capsys)


def test_a_checkpoint_of_another_task(bundle: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(evaluate(bundle, tmp_path, config="bert_w8a8_cola"), capsys)
    assert "is a checkpoint for rte; expected one for cola" in message


def test_a_bad_checkpoint(bundle: Card, glue: str, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle.folder / "w8a8.safetensors").write_bytes(b"gone")
    message = refusal(evaluate(bundle, tmp_path / "out", "--dataset", glue), capsys)
    assert "w8a8.safetensors: has 4 bytes; card.json expects" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_split(bundle: Card, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "glue", "rte", {"train": RTE})
    assert "no split 'validation'; it has train" in refusal(evaluate(bundle, tmp_path / "out", "--dataset", data), capsys)


def test_an_output_that_cannot_be_written(bundle: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refusal(evaluate(bundle, tmp_path / "file"), capsys)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(device: str, bundle: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device.startswith("cuda") and torch.cuda.device_count() > 99:
        pytest.skip("has a hundred GPUs")
    assert f"--device {device}: cannot be used here" in refusal(evaluate(bundle, tmp_path, "--device", device), capsys)


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert_quanteval, "listing", lambda: {}[LINEAR])
    with pytest.raises(KeyError):
        main(["--list"])
