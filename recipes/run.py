"""A recipe on its data: what its stages share."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from recipes.data import encode
from recipes.evaluation import Evaluation, evaluate
from recipes.losses import Batch, Loss, label_loss
from recipes.recipe import Recipe, Training
from recipes.tasks import RecipeError, Task
from recipes.training import Job, train

DONE = "done"
Encoded = list[dict[str, Any]]


@dataclass
class Run:
    """A recipe on its data, the program's flags, and what was measured so far."""

    recipe: Recipe
    args: argparse.Namespace
    task: Task
    train_rows: Dataset
    eval_rows: Dataset
    eval_split: str
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    estimators: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def encoded(self, task: Task, rows: Dataset, padded: bool = False, tokenizer: PreTrainedTokenizerBase | None = None) -> Encoded:
        """Rows as token ids, of their own lengths or all of the recipe's; by the base model's tokenizer or another."""
        if not len(rows):
            return []
        found = encode(rows, task, tokenizer or self.tokenizer, self.recipe.max_length, padding="max_length" if padded else False)
        return found.with_format(None).remove_columns([c for c in ("example_index", "offsets") if c in found.column_names]).to_list()  # type: ignore[no-any-return]

    def collator(self, padded: bool, tokenizer: PreTrainedTokenizerBase | None = None) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads to the longest of a batch, or to the recipe's length: with the clamped mask a quantized model sees the padding."""
        collate = DataCollatorWithPadding(
            tokenizer or self.tokenizer, "max_length" if padded else True, self.recipe.max_length if padded else None
        )
        return lambda rows: collate([dict(row) for row in rows])

    def measure(self, what: str, model: nn.Module) -> dict[str, Any]:
        """Evaluate as the evaluator does, print it, and keep it under ``what``; the metrics with ``rows`` and ``split``."""
        return self.keep(what, self.evaluate(model, f"evaluate {what}"))

    def keep(self, what: str, result: Evaluation) -> dict[str, Any]:
        """Print an evaluation, and keep its metrics under ``what``, with ``rows`` and ``split``."""
        self.metrics[what] = self.figures(result)
        self.seconds[f"evaluate {what}"] = round(result.seconds, 1)
        self.say(f"{what}: " + ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items()))
        return self.metrics[what]

    def figures(self, result: Evaluation) -> dict[str, Any]:
        """The metrics, with ``rows`` and ``split``."""
        return {**result.metrics, "rows": result.rows, "split": self.eval_split}

    def evaluate(
        self, model: nn.Module, description: str = "", progress: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Evaluation:
        """In float32, every row padded to the recipe's length."""
        encoded = encode(self.eval_rows, self.task, tokenizer or self.tokenizer, self.recipe.max_length)
        args = self.args
        return evaluate(
            model,
            encoded,
            self.task,
            rows=self.eval_rows,
            batch_size=args.eval_batch_size,
            device=args.device,
            description=description,
            progress=progress,
        )

    @property
    def processes(self) -> PartialState:
        """The processes that ``accelerate launch`` started, or this one alone."""
        return PartialState(cpu=self.args.device == "cpu")

    def say(self, text: str) -> None:
        """Print, once however many processes there are."""
        if self.processes.is_main_process:
            print(text, flush=True)

    def stage(
        self,
        name: str,
        key: str,
        model: nn.Module,
        rows: Encoded,
        settings: Training,
        *,
        loss: Loss = label_loss,
        task: Task | None = None,
        padded: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trained_before: bool = False,
        **changes: Any,
    ) -> None:
        """Train one stage in the folder of its key; a stage that is done is only loaded.

        Raises:
            RecipeError: ``trained_before``, and it was not.
        """
        folder = self.stage_folder(name, key)
        if trained_before and not (folder / DONE).exists():
            raise RecipeError(
                f"--stage qat: {self.folder} holds no finished {name} with these settings; run --stage fp32 first, or --stage all"
            )
        began = time.perf_counter()
        eval_steps = self.args.eval_steps if task in (None, self.task) else None
        train(
            Job(
                model=model,
                task=task or self.task,
                rows=rows,
                collate=self.collator(padded, tokenizer),
                loss=loss,
                settings=settings,
                folder=folder,
                seed=self.recipe.seed,
                by_length=not padded,
                evaluate=lambda model: self.evaluate(model, progress=False, tokenizer=tokenizer).metrics,
                eval_steps=eval_steps,
                save_steps=self.args.save_steps,
                max_steps=self.args.max_steps,
                device=self.args.device,
                title=name,
                **changes,
            )
        )
        (folder / DONE).touch()
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def stage_folder(self, name: str, key: str) -> Path:
        return self.folder / "stages" / f"{name}-{key[:12]}"

    def stage_key(self, before: str, name: str, settings: Training, rows: Encoded) -> str:
        """A hash of all that decides a stage's outcome: what went before, settings and rows."""
        return key_of(before, name, asdict(settings), rows, self.args.max_steps)


def key_of(before: str, *settings: Any) -> str:
    return hashlib.sha256(json.dumps([before, *settings], sort_keys=True).encode()).hexdigest()
