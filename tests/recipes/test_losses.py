"""Losses against their written-out formulas, and a teacher that is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering

from recipes.losses import TEACHER, answers_of, distillation_loss, distilled_loss, label_loss, logits_of, task_loss
from recipes.recipe import Training
from recipes.training import train
from tests.recipes.test_training import collate, job, rows, tiny
from tests.tiny import tiny_batch, tiny_bert


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distillation_equals_its_formula() -> None:
    student, teacher = random(5, 3), random(5, 3, seed=1)
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx((4 * kl(teacher / 2, student / 2) / 5).item(), rel=1e-5)
    assert distillation_loss(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 2.0).item() == pytest.approx(4.0)


def test_distillation_of_spans_is_the_mean_over_start_and_end() -> None:
    student, teacher = random(5, 7, 2), random(5, 7, 2, seed=1)
    expected = sum(9 * kl(teacher[..., i] / 3, student[..., i] / 3) / 5 for i in range(2)) / 2
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(float(expected), rel=1e-5)


def test_task_loss_equals_its_formula() -> None:
    assert task_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])).item() == pytest.approx(2.5)
    logits, answers = random(4, 7, 2), torch.tensor([[0, 1], [2, 6], [3, 3], [5, 6]])
    chosen = logits.log_softmax(dim=1).gather(1, answers[:, None, :])  # [4, 1, 2]
    assert task_loss(logits, answers).item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_spans_have_the_loss_of_transformers() -> None:
    model = tiny_bert(BertForQuestionAnswering)
    batch = {**tiny_batch(rows=3, length=9), "start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 2, 0])}
    loss, logits = label_loss(model, batch)
    assert logits.shape == (3, 9, 2)
    assert answers_of(batch).tolist() == [[1, 3], [2, 2], [0, 0]]
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_distillation_pulls_towards_the_teacher(tmp_path: Path) -> None:
    teacher = tiny()
    train(job(teacher, tmp_path / "teacher", settings=Training(lr=5e-3, epochs=3, batch=8)))
    with torch.no_grad():
        taught = [{**row, TEACHER: logits} for row, logits in zip(rows(), logits_of(teacher, collate(rows())), strict=True)]

    def with_teacher(batch: list[Any]) -> dict[str, torch.Tensor]:
        return collate(batch) | {TEACHER: torch.stack([row[TEACHER] for row in batch])}

    student = tiny()
    settings = Training(lr=5e-3, epochs=6, batch=8, hidden_dropout=0.0)
    loss = distilled_loss(weight=1.0, temperature=2.0)
    train(job(student, tmp_path / "student", settings=settings, loss=loss, rows=taught, collate=with_teacher))
    with torch.no_grad():
        fresh, learned, target = (logits_of(model.eval(), collate(rows())) for model in (tiny(), student, teacher))
    assert distillation_loss(learned, target, 1.0) < distillation_loss(fresh, target, 1.0) / 2


def test_the_weight_mixes_both() -> None:
    model, batch = tiny(), collate(rows())
    taught = batch | {TEACHER: torch.zeros(len(rows()), 2)}
    (labels, logits), (mixed, _) = label_loss(model, batch), distilled_loss(0.25, 2.0)(model, taught)
    expected = 0.75 * labels + 0.25 * distillation_loss(logits, taught[TEACHER], 2.0)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)
