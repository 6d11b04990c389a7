"""The stages in floating point: the base model, other tasks before, and fine-tuning. Each can be killed, and is not run twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from recipes.base_model import base_model_folder, base_weights_sha256, load_base, set_dropouts
from recipes.data import load_rows
from recipes.losses import distilled_loss
from recipes.low_rank import add_low_rank
from recipes.real_or_fake import real_or_fake
from recipes.recipe import Intermediate, Recipe, Training
from recipes.run import Encoded, Run, key_of
from recipes.tasks import RecipeError, Task, find_task
from recipes.teacher import taught_rows


@dataclass(frozen=True)
class Rewrite:
    """Another form of the model, with the same parameters, through which the task itself is trained.

    Attributes:
        settings: all that decides what it computes, as plain values.
        apply: model → its other form.
    """

    settings: Mapping[str, Any]
    apply: Callable[[PreTrainedModel], nn.Module]


def fine_tune(run: Run, rewrite: Rewrite | None = None, **changes: Any) -> tuple[PreTrainedModel, nn.Module, str]:
    """Train on the intermediate tasks and on the task itself.

    Args:
        rewrite: what the task itself is trained through; the intermediate tasks are trained as the model is.
        changes: of the last stage's ``recipes.training.Job``.

    Returns:
        the FP32 model, what was trained last (the model, or its other form), and the key of how they came to be.
    """
    recipe = run.recipe
    key = key_of("", recipe.seed, recipe.max_length, recipe.method, recipe.rank, base_weights_sha256(base_model_folder(recipe.base_model)))
    stages: list[tuple[str, Task, Training, Encoded, int]] = [
        (before.task, *intermediate_rows(run, before)) for before in recipe.intermediate
    ]
    rows = taught_rows(run, recipe.teacher) if recipe.teacher else run.encoded(run.task, run.train_rows)
    stages.append(("finetune", run.task, recipe.finetune, rows, run.task.num_labels))
    if recipe.teacher:
        changes["loss"] = distilled_loss(recipe.teacher.distillation.weight, recipe.teacher.distillation.temperature)
    model = start(recipe, run.task, stages[0][4])
    trained: nn.Module = model
    for name, task, settings, rows, labels in stages:
        last = name == stages[-1][0]
        if labels != model.config.num_labels:
            model = with_new_head(recipe, run.task, model, labels)
        set_dropouts(model, settings.hidden_dropout, settings.attention_dropout)
        if last and rewrite:
            key = key_of(key, rewrite.settings)
        if last and recipe.teacher:
            key = key_of(key, asdict(recipe.teacher.distillation))
        key = run.stage_key(key, name, settings, rows)
        trained = rewrite.apply(model) if last and rewrite else model
        run.stage(name, key, trained, rows, settings, task=task, trained_before=run.args.stage == "qat", **changes if last else {})
    return model, trained, key


def start(recipe: Recipe, task: Task, num_labels: int) -> PreTrainedModel:
    """The base model as the recipe trains it."""
    model, _ = load_base(recipe.base_model, num_labels, span=task.span, seed=recipe.seed)
    model.set_attn_implementation("eager")  # fused attention in bf16 took 42 % of a training step on a CPU (torch 2.13)
    if recipe.method == "low_rank":
        add_low_rank(model, recipe.rank, recipe.seed)
    return model


def with_new_head(recipe: Recipe, task: Task, model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """The trained encoder under a head that is drawn anew."""
    fresh = start(recipe, task, num_labels)
    body = {name: x for name, x in model.state_dict().items() if name.startswith(f"{model.base_model_prefix}.")}
    fresh.load_state_dict(body, strict=False)
    return fresh


def intermediate_rows(run: Run, settings: Intermediate) -> tuple[Task, Training, Encoded, int]:
    """Another task, its settings and rows with its labels mapped to ours, and how many labels these are."""
    task = find_task(settings.task)
    if task.span != run.task.span:
        raise RecipeError(f"intermediate {task.name}: is a {task.kind} task, {run.task.name} a {run.task.kind} task; the models differ")
    rows, _ = load_rows(task, run.recipe.dataset or task.hub_id, settings.split, max_rows=run.args.max_train_rows)
    if settings.real_or_fake:
        rows, task = real_or_fake(rows, task, run.recipe.seed), find_task("cola")
    encoded = run.encoded(task, rows)
    if settings.label_map is None:
        return task, settings, encoded, task.num_labels
    for row in encoded:
        if row["labels"] not in settings.label_map:
            raise RecipeError(
                f"intermediate {task.name}: label_map has no {row['labels']!r}; it has {', '.join(map(str, settings.label_map))}"
            )
        row["labels"] = settings.label_map[row["labels"]]
    return task, settings, encoded, max(settings.label_map.values()) + 1
