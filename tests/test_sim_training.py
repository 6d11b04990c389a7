"""Quantization-aware training: gradients arrive everywhere, steps lower the loss, and evaluation follows the steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.tiny import LABELS, tiny_batch, tiny_sim


def test_loss_backward_reaches_every_range_and_every_weight() -> None:
    sim = tiny_sim()
    sim.model.train()
    sim.model(**tiny_batch(seed=5), labels=LABELS).loss.backward()
    for name, q in sim.quantizers.items():
        assert q.min.grad is not None, name
        assert q.max.grad is not None, name
        assert q.min.grad.isfinite().all() and q.max.grad.isfinite().all(), name  # noqa: PT018
        if not name.endswith(".mul"):  # a multiple of a grid lies on its own grid: no rounding error, no gradient but of float noise
            assert q.min.grad.abs().max() + q.max.grad.abs().max() > 0, name
    assert all(p.grad is not None for p in sim.model.parameters())


@pytest.mark.parametrize("learn", ["weights and ranges", "ranges alone"])
def test_five_steps_lower_the_loss(learn: str) -> None:
    sim, batch = tiny_sim(), tiny_batch() | {"labels": LABELS}
    parameters = sim.range_parameters() if learn == "ranges alone" else list(sim.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(6):
        loss = sim.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_after_a_step_evaluation_uses_the_new_weights_and_ranges() -> None:
    sim, batch = tiny_sim(), tiny_batch()
    sim.model(**batch, labels=LABELS).loss.backward()
    with torch.no_grad():
        before = sim.model(**batch).logits.clone()
    torch.optim.SGD(sim.model.parameters(), lr=0.5).step()
    expected = sim.model(**batch).logits.detach()  # with gradients on, nothing frozen is used
    with torch.no_grad():
        after = sim.model(**batch).logits
    assert not torch.equal(after, before)
    assert torch.equal(after, expected)


def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    sim = tiny_sim()
    rows = [{name: x[i] for name, x in tiny_batch(4, 8).items()} | {"labels": LABELS[i]} for i in range(4)]
    before = [p.clone() for p in sim.range_parameters()]
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(sim.model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert any(not torch.equal(p, q) for p, q in zip(sim.range_parameters(), before, strict=True))
    assert trainer.evaluate()["eval_loss"] > 0
