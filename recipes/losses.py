"""What is trained on: the loss of labels, and of a teacher's logits beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # of the model on a batch: the loss, and the logits that it came from

SPANS = ("start_positions", "end_positions")
TEACHER = "teacher"
ANSWERS = ("labels", *SPANS, TEACHER)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits ``[rows, classes]``, or for spans ``[rows, tokens, 2]`` (start and end)."""
    output = model(**{name: x for name, x in batch.items() if name not in ANSWERS})
    return torch.stack([output["start_logits"], output["end_logits"]], dim=-1) if "start_logits" in output else output["logits"]


def label_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of a batch's labels."""
    logits = logits_of(model, batch)
    return task_loss(logits, answers_of(batch)), logits


def distilled_loss(weight: float, temperature: float) -> Loss:
    """The loss of labels and teacher together, as :class:`recipes.recipe.Distillation` writes it; ``batch["teacher"]`` are its logits."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = logits_of(model, batch)
        of_labels, of_teacher = task_loss(logits, answers_of(batch)), distillation_loss(logits, batch[TEACHER], temperature)
        return (1 - weight) * of_labels + weight * of_teacher, logits

    return loss


def answers_of(batch: Batch) -> Tensor:
    """``labels`` ``[rows]``, or for spans the first and last token ``[rows, 2]``."""
    return batch["labels"] if "labels" in batch else torch.stack([batch[name] for name in SPANS], dim=-1)


def task_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """In float32: squared error where there is one logit (regression), else cross-entropy; for spans the mean over start and end."""
    logits = logits.float()
    if logits.ndim == 3:  # [rows, tokens, 2] against [rows, 2]
        return functional.cross_entropy(logits, answers)
    if logits.shape[-1] == 1:  # [rows, 1]
        return functional.mse_loss(logits.squeeze(-1), answers.float())
    return functional.cross_entropy(logits, answers)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``temperature² * KL(softmax(teacher / temperature) ‖ softmax(logits / temperature))`` (Hinton et al., 2015).

    Squared error for one logit; for spans (``[rows, tokens, 2]``, softmax over tokens) the mean over start and end.
    """
    if logits.shape[-1] == 1:
        return functional.mse_loss(logits.float(), teacher.float())
    student, target = (functional.log_softmax(x.float() / temperature, dim=1) for x in (logits, teacher))
    heads = logits.shape[-1] if logits.ndim == 3 else 1
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2 / heads
