"""The loop: order, modes, repetition, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, BertForQuestionAnswering, PreTrainedTokenizerBase

from recipes import evaluation
from recipes.data import encode
from recipes.evaluation import Evaluation, evaluate
from recipes.tasks import TASKS, RecipeError
from tests.recipes.test_data import SQUAD
from tests.tiny import tiny_bert

WORDS = ("red", "green", "blue", "one", "two", "three", "four")
RTE = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:2])]


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def rte(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return encode(Dataset.from_list(RTE), TASKS["rte"], tokenizer, max_length=24)


def run(model: nn.Module, encoded: Dataset, task: str = "rte", **options: object) -> Evaluation:
    return evaluate(model, encoded, TASKS[task], progress=False, **options)  # type: ignore[arg-type]


def test_logits_are_the_model_s_in_the_rows_order(rte: Dataset) -> None:
    model = tiny_bert()
    batch = rte.remove_columns("labels")[:]
    with torch.no_grad():
        expected = model(**batch).logits
    result = run(model, rte, batch_size=4)  # 14 rows: the last batch is smaller
    torch.testing.assert_close(torch.from_numpy(result.logits), expected, rtol=1e-5, atol=1e-5)
    assert result.predictions == expected.argmax(1).tolist()
    right = sum(said == row["label"] for said, row in zip(result.predictions, RTE, strict=True))
    assert result.metrics == {"accuracy": pytest.approx(100 * right / 14)}
    assert result.rows == 14


def test_twice_the_same_bits_and_the_mode_is_kept(rte: Dataset) -> None:
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    first, second = run(model, rte), run(model, rte)
    assert (first.logits == second.logits).all()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


class Processes:
    """Three processes, played one after the other."""

    num_processes, process_index = 3, 0

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def play(self, compute: Callable[[], object], error: object) -> list[object]:
        found = []
        for rank in range(self.num_processes):
            self.process_index = rank
            found.append(compute())
        return found


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 14])
@pytest.mark.parametrize("batch", [1, 4])
def test_three_processes_share_the_batches_and_gather_the_bits_of_one(
    rte: Dataset, rows: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded = tiny_bert(), rte.select(range(rows))
    alone = run(model, encoded, batch_size=batch)
    processes = Processes()
    monkeypatch.setattr(evaluation, "PartialState", lambda cpu: processes)
    monkeypatch.setattr(evaluation, "on_every_process", processes.play)
    together = run(model, encoded, batch_size=batch)
    assert (together.logits == alone.logits).all()
    assert together.metrics == alone.metrics


def test_the_bar_names_the_model(rte: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tiny_bert(), rte, TASKS["rte"], description="W8A8")
    assert "W8A8: 100%" in capsys.readouterr().err


def test_regression(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list([{**row, "label": float(i)} for i, row in enumerate(RTE)])
    result = run(tiny_bert(num_labels=1), encode(rows, TASKS["stsb"], tokenizer, max_length=24), "stsb")
    assert set(result.metrics) == {"pearson", "spearman"}
    assert result.predictions == result.logits[:, 0].tolist()


def test_spans(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list(SQUAD)
    encoded = encode(rows, TASKS["squad"], tokenizer, max_length=48)
    result = run(tiny_bert(BertForQuestionAnswering), encoded, "squad", rows=rows)
    assert result.rows == 2
    assert result.logits.shape == (len(encoded), 48, 2)
    assert all(said in row["context"] for said, row in zip(result.predictions, SQUAD, strict=True))
    with pytest.raises(RecipeError, match="needs rows="):
        run(tiny_bert(BertForQuestionAnswering), encoded, "squad")


def test_another_head(rte: Dataset) -> None:
    with pytest.raises(RecipeError, match="gives start_logits, end_logits and no logits"):
        run(tiny_bert(BertForQuestionAnswering), rte)
    with pytest.raises(RecipeError, match=r"shape \[14, 3\]; expected \[rows, 2\]"):
        run(tiny_bert(num_labels=3), rte)


def test_weights_that_are_broken(rte: Dataset) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(RecipeError, match="logits of 14 rows are not finite"):
        run(model, rte)


def test_rows_of_unequal_length(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(Dataset.from_list(RTE), TASKS["rte"], tokenizer, padding=False)
    with pytest.raises(RecipeError, match=r"unequal length in .*input_ids"):
        run(tiny_bert(), encoded)


def test_nothing_to_do(rte: Dataset) -> None:
    with pytest.raises(RecipeError, match="no rows"):
        run(tiny_bert(), rte.select([]))
    with pytest.raises(RecipeError, match="batch size 0"):
        run(tiny_bert(), rte, batch_size=0)
