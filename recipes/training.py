"""One training loop, for floating point and for quantized models: it can be killed at any moment and goes on exactly.

What a step does follows from the seed, the step's number and the weights alone: the order of rows is drawn anew for each
epoch and dropout for each step, so a run that resumes from a checkpoint ends with the weights of one that never stopped.
Launched as several processes (``accelerate launch``), each takes its share of every batch and gradients are summed once a
step. Nothing wraps the model: ranges may stop learning at any step and a batch need not divide evenly, neither of which
``DistributedDataParallel`` takes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from transformers import get_scheduler

from quantsim.numerics.fused import fused_kernels
from quantsim.quantizers.processes import on_every_process
from recipes.averages import Averages
from recipes.batches import Batches, shares
from recipes.losses import Batch, Loss, answers_of
from recipes.low_rank import LowRank
from recipes.optimizers import optimizer_of
from recipes.progress import Progress
from recipes.recipe import Training
from recipes.shares import add_gradients, start_from_the_first
from recipes.tasks import RecipeError, Task

Rows = Sequence[Mapping[str, Any]]

CHECKPOINT, STAGING, LOG = "step-", ".saving", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run of :func:`train` trains, on what, and where it keeps its checkpoints.

    Attributes:
        model: trained in place; every parameter that requires a gradient.
        task: whose headline metric the progress bar shows, over the last batches as they were trained on.
        rows: each with ``input_ids``.
        collate: rows → a batch with its answers.
        loss: of the model on a batch.
        settings: the recipe's.
        folder: of the checkpoints; with one in it, the run goes on from there.
        seed: of the rows' order and of dropout.
        by_length: rows of like length share a batch; for a ``collate`` that pads to the longest.
        ranges, range_lr: parameters of quantizers, and their learning rate.
        fused: run elementwise functions (fake quantizers, integer LayerNorm) as compiled kernels.
        before_step: called with the number of the coming step and that of all steps.
        evaluate, eval_steps: metrics of the model, taken every so many steps, shown and written to the log; ``None`` never.
        save_steps: optimizer steps from one checkpoint to the next; ``None`` keeps one an epoch.
        max_steps: stop there, for trials; ``None`` trains to the end.
        device: ``"cpu"``, or what accelerate finds.
        title: before the progress bar.
    """

    model: nn.Module
    task: Task
    rows: Rows
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch]
    loss: Loss
    settings: Training
    folder: Path
    seed: int
    by_length: bool = False
    ranges: Sequence[nn.Parameter] = ()
    range_lr: float = 0.0
    fused: bool = False
    before_step: Callable[[int, int], None] | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    max_steps: int | None = None
    device: str | None = None
    title: str = "train"


def train(job: Job) -> None:
    """Train to the end, from the last checkpoint if there is one. The model is in eval mode afterwards.

    Raises:
        RecipeError: no rows, or a loss that is not finite (training stops there; the last checkpoint is from before).
    """
    if not job.rows:
        raise RecipeError(f"{job.title}: no rows to train on; check the split and the fold")
    _Run(job).to_the_end()


class _Run:
    """A job with what accelerate prepared for it."""

    def __init__(self, job: Job) -> None:
        self.job, settings = job, job.settings
        self.accelerator = Accelerator(
            cpu=job.device == "cpu",
            mixed_precision="no",  # accelerate's is one for the process; here autocast is each stage's own
            dataloader_config=DataLoaderConfiguration(split_batches=True),  # a scheduler's step is one step, however many processes
        )
        lengths = [len(row["input_ids"]) if job.by_length else 0 for row in job.rows]
        self.batches = Batches(lengths, settings.batch, job.seed)
        self.total = min(max(1, round(len(self.batches) * settings.epochs)), job.max_steps or sys.maxsize)
        optimizer = optimizer_of(parameter_groups(job), settings)
        scheduler = get_scheduler(settings.schedule, optimizer, round(settings.warmup_ratio * self.total), self.total)
        self.model = self.accelerator.prepare_model(job.model, evaluation_mode=True)  # on its device, and not wrapped
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer, scheduler)
        ranges = {id(p) for p in job.ranges}
        self.weights = [p for p in job.model.parameters() if p.requires_grad and id(p) not in ranges]
        self.averages = Averages(self.weights, settings.average) if settings.average else None
        if self.averages is not None:
            self.accelerator.register_for_checkpointing(self.averages)
        self.step = self.saved = 0

    def to_the_end(self) -> None:
        self._resume()
        start_from_the_first(self.model)
        if self.averages is not None:
            start_from_the_first(self.averages)
        shown = self.accelerator.is_main_process
        with fused_kernels(self.job.fused), Progress(self.job.task, self.job.title, self.total, self.step, shown) as progress:
            while self.step < self.total:
                self._epoch(progress)
        if self.averages is not None:
            self.averages.put()
        self.accelerator.free_memory()
        self.job.model.eval()

    def _epoch(self, progress: Progress) -> None:
        """What is left of the epoch that the next step is in."""
        job = self.job
        epoch, done = divmod(self.step, len(self.batches))
        start, losses = time.time(), []
        self.model.train()
        for batch in self.batches.of_epoch(epoch)[done : done + self.total - self.step]:
            losses.append(self._step(batch, progress))
            self.step += 1
            progress.stepped(epoch + 1)
            if job.evaluate is not None and job.eval_steps and (self.step % job.eval_steps == 0 or self.step == self.total):
                metrics = dict(job.evaluate(self.model))
                progress.evaluated(metrics)
                self._log(step=self.step, **{f"eval_{name}": value for name, value in metrics.items()})
            if job.save_steps and self.step % job.save_steps == 0:
                self._save()
        seconds = round(time.time() - start, 1)
        self._log(epoch=epoch + 1, step=self.step, loss=round(math.fsum(losses) / len(losses), 6), seconds=seconds)
        self._save()

    def _step(self, batch: Sequence[int], progress: Progress) -> float:
        """One optimizer step; the mean loss of the batch, over all processes."""
        job, accelerator = self.job, self.accelerator
        if job.before_step is not None:
            job.before_step(self.step, self.total)
        total = 0.0
        parts = shares(batch, accelerator.process_index, accelerator.num_processes, job.settings.accumulate)
        for part, (rows, weight) in enumerate(parts):
            torch.manual_seed(hash((job.seed, self.step, part, accelerator.process_index)))
            inputs = {name: x.to(accelerator.device) for name, x in job.collate([job.rows[i] for i in rows]).items()}
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=job.settings.mixed_precision == "bf16"):
                loss, logits = job.loss(self.model, inputs)
            accelerator.backward(loss * weight)
            value = loss.item()
            progress.saw(value, logits, answers_of(inputs))
            total += value * weight
        total = add_gradients((p for group in self.optimizer.param_groups for p in group["params"]), total)
        if not math.isfinite(total):
            raise RecipeError(f"{job.title}: the loss is {total} in step {self.step + 1}; lower the learning rate ({job.settings.lr:g})")
        accelerator.clip_grad_norm_(self.weights, job.settings.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.averages is not None:
            self.averages.update()
        return total

    # ---- checkpoints: a folder appears under its name when it is whole, then the one before goes ----

    def _save(self) -> None:
        final, staging = self.job.folder / f"{CHECKPOINT}{self.step}", self.job.folder / STAGING
        if self.saved == self.step:
            return
        self.saved = self.step
        self.accelerator.save_state(str(staging))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            staging.rename(final)
            for old in checkpoints(self.job.folder)[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self.job.folder / STAGING, ignore_errors=True)
            self.job.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        found = on_every_process(lambda: checkpoints(self.job.folder)[-1:], RecipeError)
        if any(seen != found[0] for seen in found):
            raise RecipeError(f"{self.job.folder}: the processes see different checkpoints in it; give a folder that all machines share")
        for checkpoint in found[0]:
            self.accelerator.load_state(str(checkpoint))
            self.step = self.saved = _step_of(checkpoint)

    def _log(self, **values: float) -> None:
        if self.accelerator.is_main_process:
            with (self.job.folder / LOG).open("a") as file:
                file.write(json.dumps(values) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a job's folder, the oldest first."""
    return sorted(folder.glob(f"{CHECKPOINT}*"), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def parameter_groups(job: Job) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and decay: factors or matrices, vectors (norms, biases), ranges."""
    settings = job.settings
    whole_lr = settings.lr if settings.whole_lr is None else settings.whole_lr
    ranges = {id(p) for p in job.ranges}
    factors = {id(p) for module in job.model.modules() if isinstance(module, LowRank) for p in module.parameters()}
    weights = [p for p in job.model.parameters() if p.requires_grad and id(p) not in ranges]
    lr = {id(p): settings.lr if id(p) in factors or not factors else whole_lr for p in weights}
    groups = [
        {
            "params": [p for p in weights if lr[id(p)] == rate and (p.ndim > 1) == decays],
            "lr": rate,
            "weight_decay": settings.weight_decay * decays,
        }
        for rate in dict.fromkeys((settings.lr, whole_lr))
        for decays in (True, False)
    ]
    groups.append({"params": list(job.ranges), "lr": job.range_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
