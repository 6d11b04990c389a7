"""Rows from a folder and from the sample; refusals; rows → tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes import data
from recipes.data import DataError, MissingSplitError, encode, load_rows, rows_sha256
from recipes.metrics import best_spans
from recipes.tasks import TASKS, Task

RTE = [
    {"sentence1": "A dog ran.", "sentence2": "A dog moved.", "label": 0, "idx": 0},
    {"sentence1": "It rained.", "sentence2": "The sun shone.", "label": 1, "idx": 1},
    {"sentence1": "He ate.", "sentence2": "He slept.", "label": 1, "idx": 2},
]
SQUAD = [
    {
        "question": " who ran",
        "context": "in may bob ran far " * 6 + "and ann won",
        "answers": {"text": ["ann", "Ann"], "answer_start": [118, 118]},
    },
    {"question": "when", "context": "in may bob ran", "answers": {"text": ["may"], "answer_start": [3]}},
]


def write_dataset(folder: Path, config: str, splits: dict[str, list[dict[str, Any]]]) -> str:
    """The Hub's layout: a README that says which file is which split."""
    (folder / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


@pytest.fixture
def glue(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "glue", "rte", {"train": RTE, "validation": RTE[:2]})


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


# ---- load ----


def test_a_folder(glue: str, no_hub: None) -> None:
    rows, source = load_rows(TASKS["rte"], glue)
    assert rows.to_list() == RTE[:2]
    assert (source.name, source.kind, source.split) == (glue, "dataset", "validation")
    assert len(load_rows(TASKS["rte"], glue, "train")[0]) == 3


def test_the_first_rows_alone(glue: str, no_hub: None) -> None:
    assert load_rows(TASKS["rte"], glue, max_rows=1)[0].to_list() == RTE[:1]
    assert len(load_rows(TASKS["rte"], glue, max_rows=99)[0]) == 2
    with pytest.raises(DataError, match="0 rows asked for"):
        load_rows(TASKS["rte"], glue, max_rows=0)


def test_without_a_hub_the_sample_and_a_warning(no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows, source = load_rows(TASKS["rte"])
    assert (source.kind, source.name) == ("sample", "rte.jsonl")
    assert len(rows) >= 200
    assert "not GLUE" in str(source)
    warning = capsys.readouterr().err
    assert "WARNING" in warning
    assert "NOT GLUE" in warning


def test_the_sample_is_not_trained_on(no_hub: None) -> None:
    with pytest.raises(DataError, match=r"nyu-mll/glue: cannot load"):
        load_rows(TASKS["rte"], split="train")


def test_no_sample_of_this_task(no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "SAMPLES", tmp_path)
    with pytest.raises(DataError, match=r"cola: the Hub cannot be reached .* --dataset"):
        load_rows(TASKS["cola"])


def test_a_broken_sample(no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "SAMPLES", tmp_path)
    (tmp_path / "rte.jsonl").write_text('{"sentence1": "half a li')
    with pytest.raises(DataError, match=r"rte\.jsonl: not readable as JSON lines"):
        load_rows(TASKS["rte"])


def test_a_hub_id_is_never_replaced_by_the_sample(no_hub: None) -> None:
    with pytest.raises(DataError, match=r"owner/glue: cannot load the configuration 'rte'"):
        load_rows(TASKS["rte"], "owner/glue")


def test_no_such_folder(no_hub: None) -> None:
    with pytest.raises(DataError, match=r"\./nowhere: no such folder"):
        load_rows(TASKS["rte"], "./nowhere")


def test_no_such_split(glue: str, no_hub: None) -> None:
    with pytest.raises(MissingSplitError, match=r"no split 'test'; it has train, validation"):
        load_rows(TASKS["rte"], glue, "test")


def test_another_task_s_folder(glue: str, no_hub: None) -> None:
    with pytest.raises(DataError, match=r"cannot load the configuration 'cola' .*rte"):
        load_rows(TASKS["cola"], glue)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentence2": None}, r"row 1: sentence2 is None; expected text"),
        ({"label": -1}, r"row 1: label is -1; expected an integer from 0 to 1. Test splits have no labels"),
        ({"label": 2}, r"row 1: label is 2"),
        ({"label": None}, r"row 1: label is None"),
    ],
)
def test_rows_that_are_none(change: dict[str, Any], message: str, tmp_path: Path, no_hub: None) -> None:
    folder = write_dataset(tmp_path / "glue", "rte", {"validation": [RTE[0], RTE[1] | change]})
    with pytest.raises(DataError, match=message):
        load_rows(TASKS["rte"], folder)


def test_a_missing_column(tmp_path: Path, no_hub: None) -> None:
    folder = write_dataset(tmp_path / "glue", "rte", {"validation": [{"sentence1": "a", "label": 0}]})
    with pytest.raises(DataError, match=r"no column 'sentence2' for rte; it has sentence1, label"):
        load_rows(TASKS["rte"], folder)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -0.5])
def test_scores_are_finite_and_not_negative(label: float) -> None:
    rows = Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": label}])
    with pytest.raises(DataError, match="expected a number from 0"):
        data.check_rows(TASKS["stsb"], rows, data.DataSource("here", "dataset", "validation"))


def test_scores_of_ones_own_may_be_negative() -> None:
    rows = Dataset.from_list([{"text": "a", "label": -0.5}])
    task = Task("mine", ("text",), ("pearson",), num_labels=1, kind="regression")
    data.check_rows(task, rows, data.DataSource("here", "dataset", "all rows"))
    with pytest.raises(DataError, match="label is nan; expected a number"):
        nan = Dataset.from_list([{"text": "a", "label": float("nan")}])
        data.check_rows(task, nan, data.DataSource("here", "dataset", "all rows"))


def test_questions_without_answers() -> None:
    rows = Dataset.from_list([SQUAD[1], SQUAD[1] | {"answers": {"text": [], "answer_start": []}}])
    with pytest.raises(DataError, match="row 1: answers is"):
        data.check_rows(TASKS["squad"], rows, data.DataSource("here", "dataset", "validation"))


def test_the_rows_hash_is_of_what_the_task_reads() -> None:
    task = TASKS["rte"]
    rows = Dataset.from_list(RTE)
    assert rows_sha256(task, rows) == rows_sha256(task, rows.remove_columns("idx"))
    assert rows_sha256(task, rows) != rows_sha256(task, rows.select([1, 0, 2]))
    assert rows_sha256(task, rows) != rows_sha256(task, Dataset.from_list([*RTE[:2], RTE[2] | {"label": 0}]))


# ---- encode ----


def test_pairs_are_padded_to_one_length(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(Dataset.from_list(RTE), TASKS["rte"], tokenizer)
    assert encoded[:]["input_ids"].shape == (3, 128)
    assert encoded[:]["labels"].tolist() == [0, 1, 1]
    assert encoded[:]["labels"].dtype == torch.int64
    ids = encoded[0]["input_ids"][encoded[0]["attention_mask"].bool()]
    assert tokenizer.decode(ids, skip_special_tokens=False).count("[SEP]") == 2
    assert encoded[0]["token_type_ids"].max() == 1


def test_rows_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(Dataset.from_list(RTE), TASKS["rte"], tokenizer, max_length=8)[:]["input_ids"].shape == (3, 8)


def test_unpadded_rows_for_a_collator(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(Dataset.from_list(RTE), TASKS["rte"], tokenizer, padding=False)
    assert len({len(row["input_ids"]) for row in encoded}) > 1


def test_scores_are_floats(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": 3.8}]), TASKS["stsb"], tokenizer)
    assert encoded[:]["labels"].dtype == torch.float32
    assert encoded[0]["labels"].item() == pytest.approx(3.8)


def test_long_contexts_become_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    task = TASKS["squad"]
    rows = Dataset.from_list(SQUAD)
    encoded = encode(rows, task, tokenizer, max_length=48)
    windows = encoded.with_format("numpy")
    owners = windows["example_index"][:]
    assert owners.tolist().count(0) > 2
    assert owners[-1] == 1
    assert "offsets" not in encoded[0]  # a model is given what it takes
    marks = torch.zeros(len(encoded), 48, 2)
    for window in range(len(encoded)):
        start, end = int(windows["start_positions"][window]), int(windows["end_positions"][window])
        if start:
            marks[window, start, 0] = marks[window, end, 1] = 5.0
    answers = best_spans(task, marks.numpy(), windows["offsets"][:], owners, rows["context"][:])
    assert answers == ["ann", "may"]


def test_every_character_of_a_long_context_is_in_a_window(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list(SQUAD[:1])
    offsets = encode(rows, TASKS["squad"], tokenizer, max_length=48).with_format("numpy")["offsets"][:]
    seen = {i for low, high in offsets.reshape(-1, 2).tolist() if low >= 0 for i in range(low, high)}
    assert seen >= {i for i, character in enumerate(SQUAD[0]["context"]) if character != " "}
