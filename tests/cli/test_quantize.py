"""`quantsim quantize`: what it writes is what the library gives on the same rows; what it refuses, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from model_zoo.cards import Card
from quantsim import QuantConfig, QuantSim
from quantsim.cli import quantize
from quantsim.cli.data import FORMATS, TRAINING, drawn, find_data
from quantsim.cli.main import parse
from quantsim.config import EstimatorName
from recipes.recipe import Calibration, Quantization
from tests.cli.conftest import TEXTS, Run, names_in, save_model, write_csv
from tests.recipes.test_data import RTE, write_dataset
from tests.tiny import HEADS, tiny_bert

PAIRS = [{"a": text, "b": text[::-1], "label": i % 2} for i, text in enumerate(TEXTS)]


def ranges(sim: QuantSim) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (q.min, q.max) for name, q in sim.quantizers.items()}


def by_hand(folder: Path, texts: list[Any], length: int, config: QuantConfig | str = "aimet") -> QuantSim:
    """What a user of the library would write."""
    sim = QuantSim(BertForSequenceClassification.from_pretrained(folder), config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
    batch = tokenizer(*map(list, columns), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    sim.compute_encodings([dict(batch)])
    return sim


def same(a: QuantSim, b: QuantSim) -> bool:
    theirs = ranges(b)
    return bool(theirs) and all(torch.equal(x, y) for name, pair in ranges(a).items() for x, y in zip(pair, theirs[name], strict=True))


# ---- what it writes ----


def test_the_checkpoint_is_what_the_library_gives(checkpoint: Path, model: Path) -> None:
    sim = QuantSim.from_pretrained(checkpoint)
    assert same(sim, by_hand(model, TEXTS, 16))
    assert not same(sim, by_hand(model, TEXTS[:3], 16))
    weights = BertForSequenceClassification.from_pretrained(model).state_dict()
    assert all(torch.equal(sim.model.state_dict()[name], x) for name, x in weights.items())


def test_the_tokenizer_goes_with_it(checkpoint: Path, model: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, model))
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


def test_json_says_what_was_done(model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    found = run("quantize", model, "--data", texts, "--rows", 4, "--estimator", "percentile", "--output", tmp_path / "out", "--json").json
    assert found["command"] == "quantize"
    assert found["architecture"] == "BertForSequenceClassification"
    assert found["config"]["activations"]["estimator"] == "percentile"
    assert found["config"]["weights"]["estimator"] == "min_max"
    assert found["calibration"]["rows"] == 4
    assert found["calibration"]["max_length"] == 64  # all the positions that it has
    assert found["quantizers"] == len(QuantSim.from_pretrained(found["output"]).quantizers)


TOO = ["BertForTokenClassification", "BertForNextSentencePrediction", "BertForMaskedLM"]  # test_evaluate.py has questions and BertModel


@pytest.mark.parametrize("head", ["BertForPreTraining", *(pytest.param(head, marks=pytest.mark.slow) for head in TOO)])
def test_every_head(head: str, base: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", base, HEADS[head])
    ran = run("quantize", folder, "--data", texts, "--max-length", 12, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert head in ran.out
    sim = QuantSim.from_pretrained(tmp_path / "out")
    assert type(sim.model).__name__ == head
    assert all(quantizer.calibrated for quantizer in sim.quantizers.values())


def test_a_config_without_an_architecture_is_the_plain_model(base: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    folder = save_model(tmp_path / "model", base, HEADS["BertModel"])
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert run("quantize", folder, "--data", texts, "--output", tmp_path / "out", "--json").json["architecture"] == "BertModel"


def test_presets_bits_and_estimators(model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    flags = ["--preset", "bondarenko", "--weight-bits", 4, "--activation-bits", 6, "--weight-estimator", "mse", "--estimator", "percentile"]
    assert run("quantize", model, "--data", texts, "--max-length", 16, "--output", tmp_path / "out", *flags).code == 0
    estimators: tuple[EstimatorName, EstimatorName] = ("percentile", "mse")
    calibration = Calibration(estimator=estimators[0], weight_estimator=estimators[1])
    config = Quantization(preset="bondarenko", weight_bits=4, activation_bits=6, calibration=calibration).config()
    sim = QuantSim.from_pretrained(tmp_path / "out")
    assert sim.config == config
    assert same(sim, by_hand(model, TEXTS, 16, config))


def test_a_presets_own_estimators_stay(model: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    assert run("quantize", model, "--data", texts, "--max-length", 16, "--output", tmp_path / "out", "--preset", "ibert").code == 0
    assert QuantSim.from_pretrained(tmp_path / "out").config == QuantConfig.preset("ibert")


# ---- data ----


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix in (".csv", ".tsv"):
        return write_csv(path, PAIRS, "\t" if suffix == ".tsv" else ",")
    if suffix == ".txt":
        path.write_text("\n \n".join(row["a"] for row in PAIRS))
        return path
    rows = datasets.Dataset.from_list(PAIRS)
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path, lines=suffix == ".jsonl")
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path, suffix)
    columns = ["text"] if suffix == ".txt" else ["a", "b"]
    _, args = parse(["quantize", "model", "--output", "out", "--data", str(path), "--columns", *columns])
    data = find_data(args, None, TRAINING)
    assert data.columns == tuple(columns)
    assert data.rows.to_list() == ([{"text": row["a"]} for row in PAIRS] if suffix == ".txt" else PAIRS)


def test_pairs(model: Path, tmp_path: Path, run: Run) -> None:
    path = write_rows(tmp_path, ".parquet")
    flags = ["--data", path, "--columns", "a", "b", "--max-length", 24, "--preset", "deploy"]
    assert run("quantize", model, *flags, "--output", tmp_path / "out").code == 0
    assert same(QuantSim.from_pretrained(tmp_path / "out"), by_hand(model, [(row["a"], row["b"]) for row in PAIRS], 24, "deploy"))


def test_words_are_taken_as_words(model: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"tokens": text.split(), "tags": [0] * len(text.split())} for text in TEXTS]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("quantize", model, "--data", path, "--max-length", 20, "--output", tmp_path / "out").code == 0
    assert same(QuantSim.from_pretrained(tmp_path / "out"), by_hand(model, TEXTS, 20))


def test_the_seed_draws_the_rows() -> None:
    rows = datasets.Dataset.from_list([{"i": i} for i in range(40)])
    a, b, c = (drawn(rows, 5, seed)["i"][:] for seed in (7, 7, 8))
    assert a == b != c
    assert len(set(a)) == 5
    assert sorted(drawn(rows, 99, 7)["i"][:]) == list(range(40))


def test_a_task_and_a_folder_in_the_hubs_layout(model: Path, tmp_path: Path, no_hub: None, run: Run) -> None:
    glue = write_dataset(tmp_path / "glue", "rte", {"train": RTE, "validation": RTE[:1]})
    flags = ["--data", glue, "--max-length", 24, "--json"]
    found = run("quantize", model, *flags, "--task", "rte", "--output", tmp_path / "a").json
    assert found["calibration"]["data"] == {"name": glue, "kind": "dataset", "split": "train", "note": ""}
    assert found["calibration"]["rows"] == 3
    assert run("quantize", model, *flags, "--columns", "sentence1", "sentence2", "--subset", "rte", "--output", tmp_path / "b").code == 0
    assert same(*(QuantSim.from_pretrained(tmp_path / name) for name in "ab"))
    refused = run("quantize", model, *flags[:2], "--columns", "sentence1", "--split", "tset", "--output", tmp_path / "c").refused()
    assert "no split 'tset'; choose one by --split: train, validation" in refused


def test_a_card_of_the_zoo_is_its_floating_point_model(bundle: Card, texts: Path, tmp_path: Path, run: Run) -> None:
    ran = run("quantize", bundle.folder, "--data", texts, "--output", tmp_path / "out", "--json")
    assert ran.json["calibration"]["max_length"] == 48  # the card's
    assert ran.json["quantizers"] == len(QuantSim.from_pretrained(tmp_path / "out").quantizers)


# ---- what it refuses ----


@pytest.fixture
def refused(model: Path, texts: Path, tmp_path: Path, run: Run) -> Any:
    """The message of a run that is refused; and that nothing was written."""

    def refused(*flags: object, model: Path | str = model, data: Path | str | None = texts) -> str:
        before = names_in(tmp_path)
        message = run("quantize", model, *(["--data", data] if data else []), "--output", tmp_path / "out", *flags).refused()
        assert names_in(tmp_path) == before
        return message

    return refused


def test_no_data(refused: Any) -> None:
    assert "no data: give --data with a file, a folder or a Hub id, or --task" in refused(data=None)


def test_a_model_that_is_not_there(refused: Any, tmp_path: Path, no_hub: None) -> None:
    assert "no such folder, and no Hub id" in refused(model=tmp_path / "nowhere")
    assert "no such folder, no card of the zoo (nearest: bert_w8a8_rte), and nothing from the Hub" in refused(model="bert_w8a8_rtee")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json; expected" in refused(model=tmp_path / "empty")
    (tmp_path / "file").touch()
    assert "is a file; expected the folder" in refused(model=tmp_path / "file")


def test_a_card_without_a_checkpoint(refused: Any) -> None:
    assert "recipe only" in refused(model="bert_w8a8_squad")


def test_a_model_that_cannot_be_read(refused: Any, model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"half")
    assert "its weights cannot be read (SafetensorError" in refused(model=broken)
    (broken / "config.json").write_text("{")
    assert "its config.json cannot be read" in refused(model=broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["MyBert"]}))
    assert "its architecture 'MyBert' is no model class of transformers" in refused(model=broken)


def test_a_head_without_weights(refused: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "headless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    assert "has no weights for classifier.bias, classifier.weight" in refused(model=folder)


def test_no_tokenizer(refused: Any, texts: Path, model: Path, tmp_path: Path, run: Run) -> None:
    bare = tmp_path / "bare"
    network = tiny_bert(num_hidden_layers=1)
    assert isinstance(network, PreTrainedModel)
    network.save_pretrained(bare)
    assert "no tokenizer there; put its files there" in refused(model=bare)
    assert run("quantize", bare, "--tokenizer", model, "--data", texts, "--output", tmp_path / "other").code == 0
    small = save_model(tmp_path / "small", model, vocab_size=50)
    assert "the tokenizer knows 85 tokens, the model 50" in refused(model=small)


def test_a_checkpoint_is_quantized_already(refused: Any, checkpoint: Path) -> None:
    assert "is quantized already" in refused(model=checkpoint)


def test_models_that_take_no_text(refused: Any, model: Path, base: Path, tmp_path: Path) -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    assert "takes no input_ids, and rows here are text" in refused("--tokenizer", model, model=tmp_path / "vit")
    choice = save_model(tmp_path / "choice", base, HEADS["BertForMultipleChoice"])
    assert "takes several choices a row" in refused(model=choice)


def test_presets_that_are_not_there(refused: Any, tmp_path: Path) -> None:
    assert "no preset 'aimt'; the presets are" in refused("--preset", "aimt")
    assert "(nearest: aimet)" in refused("--preset", "aimt")
    assert "QuantSpec.bits: 99" in refused("--weight-bits", 99)
    assert "none.json: not readable as JSON" in refused("--preset", tmp_path / "none.json")


def test_a_config_that_matches_nothing(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"rules": [{"module": "*.layer.7.*", "enabled": False}]}))
    assert "'*.layer.7.*'" in refused("--preset", path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.csv", None, "no such file"),
        ("none", None, "no such file or folder"),
        ("rows.xlsx", "x", "its name ends in .xlsx; expected one of .txt, .csv"),
        ("rows.txt", "", "is empty; expected rows"),
        ("rows.txt", "\n  \n", "no rows"),
        ("rows.csv", "a,label\n", "no rows"),
        ("rows.csv", 'a,label\n"x,1\n', "cannot be read as csv"),
        ("rows.jsonl", '{"a": "x"}\n{"a"', "cannot be read as json"),
        ("rows.parquet", "PAR0", "cannot be read as parquet"),
        ("rows.csv", "a,b\nx,y\n", "which of its columns is the text? Choose one, or two for pairs, by --columns: a, b"),
        ("rows.csv", "a,b\n1,2\n", "which of its columns is the text?"),
        ("rows.jsonl", '{"a": "x"}\n{"a": null}\n', "a is None; expected text"),
    ],
)
def test_data_that_is_not_there_or_broken(name: str, text: str | None, message: str, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert message in refused(data=path)


def test_columns_that_are_not_there(refused: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", PAIRS)
    assert "no column 'aa' (nearest: a); it has a, b, label" in refused("--columns", "aa", data=path)
    assert "expected one, or two for pairs" in refused("--columns", "a", "b", "label", data=path)
    assert "of those chosen: label is 0; expected text" in refused("--columns", "label", data=write_csv(tmp_path / "x.csv", PAIRS[:1]))
    assert "no task 'rtee'" in refused("--task", "rtee", data=path)


def test_rows_longer_than_the_model(refused: Any) -> None:
    assert "--max-length 65: the model takes rows of at most 64 tokens" in refused("--max-length", 65)


def test_a_device_that_is_not_there(refused: Any) -> None:
    assert "--device abacus: cannot be used here" in refused("--device", "abacus")


# ---- where it writes ----


def test_a_folder_that_is_there(model: Path, texts: Path, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    (out / "old").touch()
    command = ["quantize", model, "--data", texts, "--rows", 2, "--output", out]
    assert "exists already; give another path, or --overwrite" in run(*command).refused()
    assert (out / "old").exists()
    assert run(*command, "--overwrite").code == 0
    assert names_in(out) == names_in(checkpoint)
    assert names_in(tmp_path) == {"out"}


def test_a_failure_leaves_nothing(model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    class Full:
        placements: tuple[()] = ()

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "calibrated", lambda *_: (Full(), 8))
    assert "No space left on device" in run("quantize", model, "--data", texts, "--output", tmp_path / "out").refused()
    assert names_in(tmp_path) == set()


def test_without_datasets_the_extra_is_named(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'quantsim[recipes]' brings it" in refused()
