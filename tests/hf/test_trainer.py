"""``transformers.Trainer`` and ``accelerate`` train the simulated model as any other: loss, checkpoints, resume, reload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from quantsim import QuantSim, State
from quantsim.hf import simulation_of
from tests.hf.words import LABELS, rows, tokenizer
from tests.tiny import tiny_bert, tiny_sim


def trainer_of(sim: QuantSim, folder: Path, **settings: Any) -> Trainer:
    defaults = {"per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3}
    args = TrainingArguments(folder, **(defaults | {"learning_rate": 5e-3, "max_steps": 4} | settings))
    return Trainer(sim.model, args, train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer())


def state(sim: QuantSim) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in sim.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_evaluated_loss(tmp_path: Path) -> None:
    sim = tiny_sim()
    trainer = trainer_of(sim, tmp_path, max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_the_evaluated_loss_is_that_of_the_logits(tmp_path: Path) -> None:
    predicted = trainer_of(tiny_sim(), tmp_path).predict(rows())  # type: ignore[arg-type]
    expected = functional.cross_entropy(torch.tensor(predicted.predictions), torch.tensor(LABELS)).item()
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert predicted.label_ids.tolist() == LABELS


def test_label_smoothing_is_in_the_loss(tmp_path: Path) -> None:
    sim = tiny_sim()
    smooth = trainer_of(sim, tmp_path, label_smoothing_factor=0.2)
    predicted = smooth.predict(rows())  # type: ignore[arg-type]
    logits, labels = torch.tensor(predicted.predictions), torch.tensor(LABELS)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - functional.cross_entropy(logits, labels).item()) > 5e-4
    assert smooth.train().training_loss > 0


def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path: Path) -> None:
    whole = tiny_sim()
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = tiny_sim(calibrated=False)  # ranges and states come from the checkpoint alone
    trainer_of(resumed, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {q.state for q in resumed.quantizers.values()} == {State.LEARNING}
    assert same(state(resumed), state(whole))
    assert not same(state(whole), state(tiny_sim()))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    sim = tiny_sim()
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(sim, tmp_path, load_best_model_at_end=True, learning_rate=0.5, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)
    assert same(state(sim), state(QuantSim.from_pretrained(trainer.state.best_model_checkpoint)))


def test_what_the_trainer_saves_is_a_checkpoint_of_both(tmp_path: Path) -> None:
    sim = tiny_sim()
    trainer = trainer_of(sim, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(state(simulation_of(model)), state(sim))
    assert same(state(QuantSim.from_pretrained(tmp_path / "saved")), state(sim))


def test_a_model_that_was_loaded_is_trained_on(tmp_path: Path) -> None:
    tiny_sim().save_pretrained(tmp_path / "saved")
    sim = simulation_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"))
    before = state(sim)
    trainer_of(sim, tmp_path / "run").train()
    assert not torch.equal(before["quantizers.classifier.output.max"], sim.quantizers["classifier.output"].max)
    sim.lower()


def test_a_lowered_model_is_evaluated(tmp_path: Path) -> None:
    sim = tiny_sim()
    simulated, lowered = trainer_of(sim, tmp_path), sim.lower()
    args = simulated.args
    loss = Trainer(lowered.model, args, eval_dataset=rows(), processing_class=tokenizer()).evaluate()["eval_loss"]
    assert loss == pytest.approx(simulated.evaluate()["eval_loss"], abs=0.02)


def test_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification: gradient checkpointing is off in a simulated model"):
        trainer_of(tiny_sim(), tmp_path, gradient_checkpointing=True).train()
    with pytest.raises(ValueError, match="gradient checkpointing is off"):
        tiny_sim().model.gradient_checkpointing_enable()


def test_gradient_checkpointing_of_the_model_before_is_left_behind() -> None:
    model = tiny_bert(num_hidden_layers=1)
    model.gradient_checkpointing_enable()
    sim = QuantSim(model.train())
    assert sim.model(**tokenizer()(["a film"], return_tensors="pt")).logits.shape == (1, 2)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """A process has one accelerator state, with one precision: other tests have theirs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_and_trains_it(precision: str) -> None:
    sim = tiny_sim()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW(sim.model.parameters(), lr=5e-3)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=lambda batch: tokenizer().pad(batch, return_tensors="pt"))
    model, optimizer, loader = accelerator.prepare(sim.model, optimizer, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(q.min.dtype is torch.float32 for q in sim.quantizers.values())
