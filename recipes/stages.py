"""The stages of a recipe: fine-tune, calibrate, train quantized. Each can be killed, and is not run twice."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from quantsim import QuantSim
from recipes.base_model import base_model_folder, base_weights_sha256, load_base, set_dropouts
from recipes.data import encode, load_rows
from recipes.evaluation import Evaluation, evaluate
from recipes.low_rank import add_low_rank
from recipes.recipe import Intermediate, Recipe, Training
from recipes.tasks import RecipeError, Task, find_task
from recipes.training import Job, Loss, distilled_loss, label_loss, train

DONE = "done"
Encoded = list[dict[str, Any]]


@dataclass
class Run:
    """A recipe on its data: what the stages below share."""

    recipe: Recipe
    args: argparse.Namespace
    task: Task
    train_rows: Dataset
    eval_rows: Dataset
    eval_split: str
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def encoded(self, task: Task, rows: Dataset) -> Encoded:
        """Rows as token ids of their own lengths."""
        found = encode(rows, task, self.tokenizer, self.recipe.max_length, padding=False)
        return found.with_format(None).to_list()  # type: ignore[no-any-return]

    def collator(self, padded: bool) -> DataCollatorWithPadding:
        """Pads to the longest of a batch, or to the recipe's length: with the clamped mask a quantized model sees the padding."""
        if padded:
            return DataCollatorWithPadding(self.tokenizer, "max_length", self.recipe.max_length)
        return DataCollatorWithPadding(self.tokenizer)

    def measure(self, what: str, model: torch.nn.Module) -> Evaluation:
        """Evaluate as the evaluator does: float32, every row padded to the recipe's length."""
        encoded = encode(self.eval_rows, self.task, self.tokenizer, self.recipe.max_length)
        result = evaluate(
            model, encoded, self.task, batch_size=self.args.eval_batch_size, device=self.args.device, description=f"evaluate {what}"
        )
        self.metrics[what] = {**result.metrics, "rows": result.rows, "split": self.eval_split}
        self.seconds[f"evaluate {what}"] = round(result.seconds, 1)
        print(f"{what}: " + ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items()), flush=True)
        return result


def fine_tune(run: Run) -> tuple[PreTrainedModel, str]:
    """The FP32 model after the intermediate tasks and the task itself, and the key of how it came to be."""
    recipe = run.recipe
    key = _key("", recipe.seed, recipe.max_length, recipe.method, recipe.rank, base_weights_sha256(base_model_folder(recipe.base_model)))
    stages: list[tuple[str, Training, Encoded, int]] = [
        (before.task, before, *intermediate_rows(run, before)) for before in recipe.intermediate
    ]
    stages.append(("finetune", recipe.finetune, run.encoded(run.task, run.train_rows), run.task.num_labels))
    model = start(recipe, stages[0][3])
    for name, settings, rows, labels in stages:
        if labels != model.config.num_labels:
            model = with_new_head(recipe, model, labels)
        set_dropouts(model, settings.hidden_dropout, settings.attention_dropout)
        key = run_stage(run, name, key, model, rows, settings, trained_before=run.args.stage == "qat")
    return model, key


def start(recipe: Recipe, num_labels: int) -> PreTrainedModel:
    """The base model as the recipe trains it."""
    model, _ = load_base(recipe.base_model, num_labels, seed=recipe.seed)
    model.set_attn_implementation("eager")  # fused attention in bf16 took 42 % of a training step on a CPU (torch 2.13)
    if recipe.method == "low_rank":
        add_low_rank(model, recipe.rank, recipe.seed)
    return model


def with_new_head(recipe: Recipe, model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """The trained encoder under a head that is drawn anew."""
    fresh = start(recipe, num_labels)
    body = {name: x for name, x in model.state_dict().items() if name.startswith(f"{model.base_model_prefix}.")}
    fresh.load_state_dict(body, strict=False)
    return fresh


def intermediate_rows(run: Run, settings: Intermediate) -> tuple[Encoded, int]:
    """Rows of another task with its labels mapped to ours, and how many labels these are."""
    task = find_task(settings.task)
    rows, _ = load_rows(task, run.recipe.dataset, settings.split, max_rows=run.args.max_train_rows)
    encoded = run.encoded(task, rows)
    if settings.label_map is None:
        return encoded, task.num_labels
    for row in encoded:
        if row["labels"] not in settings.label_map:
            raise RecipeError(
                f"intermediate {task.name}: label_map has no {row['labels']!r}; it has {', '.join(map(str, settings.label_map))}"
            )
        row["labels"] = settings.label_map[row["labels"]]
    return encoded, max(settings.label_map.values()) + 1


def quantize(run: Run, model: PreTrainedModel) -> QuantSim:
    """The simulation, calibrated on training rows that the seed draws."""
    recipe, ranges = run.recipe, run.recipe.quantization.calibration
    model = copy.deepcopy(model)
    set_dropouts(model, recipe.qat.hidden_dropout, recipe.qat.attention_dropout)
    model.train(False)
    sim = QuantSim(model.to(run.args.device), recipe.quantization.config(), in_place=True)
    rows = run.encoded(run.task, run.train_rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()[: ranges.rows]
    collate = run.collator(padded=True)
    began = time.perf_counter()
    sim.compute_encodings([dict(collate([rows[i] for i in order[k : k + ranges.batch]])) for k in range(0, len(order), ranges.batch)])
    run.seconds["calibrate"] = round(time.perf_counter() - began, 1)
    return sim


def train_quantized(run: Run, sim: QuantSim, teacher: PreTrainedModel, key: str) -> None:
    """QAT of weights and ranges; the ranges are fixed for the last part, and afterwards."""
    settings = run.recipe.qat
    key = _key(key, asdict(run.recipe.quantization), sim.config.to_dict())
    loss: Loss = label_loss
    if (distillation := settings.distillation) is not None:
        loss = distilled_loss(teacher.to(run.args.device), distillation.weight, distillation.temperature)

    def freeze_late(step: int, total: int) -> None:
        if step >= total * (1 - settings.freeze_ranges_last) and sim.range_parameters():
            sim.freeze_ranges()

    rows = run.encoded(run.task, run.train_rows)
    ranges: dict[str, Any] = {"ranges": sim.range_parameters(), "range_lr": settings.range_lr, "before_step": freeze_late}
    run_stage(run, "qat", key, sim.model, rows, settings, loss=loss, padded=True, **ranges)
    sim.freeze_ranges()


def run_stage(
    run: Run,
    name: str,
    key: str,
    model: torch.nn.Module,
    rows: Encoded,
    settings: Training,
    *,
    loss: Loss = label_loss,
    padded: bool = False,
    trained_before: bool = False,
    **changes: Any,
) -> str:
    """Train one stage in a folder named after all that decides its outcome; the key of that."""
    key = _key(key, name, asdict(settings), rows, run.args.max_steps)
    folder = run.folder / "stages" / f"{name}-{key[:12]}"
    if trained_before and not (folder / DONE).exists():
        raise RecipeError(f"--stage qat: {run.folder} holds no finished {name} with these settings; run --stage fp32 first, or --stage all")
    began = time.perf_counter()
    train(
        Job(
            model=model,
            rows=rows,
            collate=run.collator(padded),  # type: ignore[arg-type]
            loss=loss,
            settings=settings,
            folder=folder,
            seed=run.recipe.seed,
            by_length=not padded,
            save_steps=run.args.save_steps,
            max_steps=run.args.max_steps,
            device=run.args.device,
            title=name,
            **changes,
        )
    )
    (folder / DONE).touch()
    run.seconds[name] = round(time.perf_counter() - began, 1)
    return key


def _key(before: str, *settings: Any) -> str:
    return hashlib.sha256(json.dumps([before, *settings], sort_keys=True).encode()).hexdigest()
