"""One training loop, for floating point and for quantized models: it can be killed at any moment and goes on exactly.

What a step does follows from the seed, the step's number and the weights alone: the order of rows is drawn anew for each
epoch and dropout for each step, so a run that resumes from a checkpoint ends with the weights of one that never stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import get_scheduler

from recipes.low_rank import LowRank
from recipes.recipe import Training
from recipes.tasks import RecipeError

Batch = Mapping[str, Tensor]
Rows = Sequence[Mapping[str, Any]]
Loss = Callable[[nn.Module, Batch], Tensor]

CHECKPOINT, STAGING, LOG = "step-", ".saving", "log.jsonl"
CHUNK = 32  # batches whose rows are sorted by length together


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run of :func:`train` trains, on what, and where it keeps its checkpoints.

    Attributes:
        model: trained in place; every parameter that requires a gradient.
        rows: each with ``input_ids``.
        collate: rows → a batch with ``labels``.
        loss: of the model on a batch.
        settings: the recipe's.
        folder: of the checkpoints; with one in it, the run goes on from there.
        seed: of the rows' order and of dropout.
        by_length: rows of like length share a batch; for a ``collate`` that pads to the longest.
        ranges, range_lr: parameters of quantizers, and their learning rate.
        before_step: called with the number of the coming step and that of all steps.
        save_steps: optimizer steps from one checkpoint to the next; ``None`` keeps one an epoch.
        max_steps: stop there, for trials; ``None`` trains to the end.
        device: ``"cpu"``, or what accelerate finds.
        title: before the progress bar.
    """

    model: nn.Module
    rows: Rows
    collate: Callable[[list[Mapping[str, Any]]], Batch]
    loss: Loss
    settings: Training
    folder: Path
    seed: int
    by_length: bool = False
    ranges: Sequence[nn.Parameter] = ()
    range_lr: float = 0.0
    before_step: Callable[[int, int], None] | None = None
    save_steps: int | None = None
    max_steps: int | None = None
    device: str | None = None
    title: str = "train"


def train(job: Job) -> None:
    """Train to the end, from the last checkpoint if there is one. The model is in eval mode afterwards.

    Raises:
        RecipeError: no rows.
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
            gradient_accumulation_steps=settings.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True),  # the recipe's batch is that of all devices together
        )
        lengths = [len(row["input_ids"]) if job.by_length else 0 for row in job.rows]
        self.batches = Batches(lengths, settings.batch // settings.accumulate, job.seed)
        self.steps_per_epoch = math.ceil(len(self.batches) / settings.accumulate)
        self.total = min(self.steps_per_epoch * settings.epochs, job.max_steps or sys.maxsize)
        loader: DataLoader[Any] = DataLoader(
            job.rows,  # type: ignore[arg-type]  # a sequence is a dataset
            batch_sampler=self.batches,
            collate_fn=job.collate,
            generator=torch.Generator(),
        )
        optimizer = torch.optim.AdamW(parameter_groups(job), lr=settings.lr, fused=True)
        scheduler = get_scheduler(settings.schedule, optimizer, round(settings.warmup_ratio * self.total), self.total)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(job.model, optimizer, loader, scheduler)
        ranges = {id(p) for p in job.ranges}
        self.weights = [p for p in job.model.parameters() if p.requires_grad and id(p) not in ranges]
        self.step = 0

    def to_the_end(self) -> None:
        self._resume()
        with tqdm(
            total=self.total, initial=self.step, desc=self.job.title, mininterval=1.0, disable=not self.accelerator.is_local_main_process
        ) as bar:
            while self.step < self.total:
                self._epoch(bar)
        self.accelerator.free_memory()
        self.job.model.eval()

    def _epoch(self, bar: Any) -> None:
        """What is left of the epoch that the next step is in."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        losses: list[float] = []
        start = time.time()
        self.batches.set_epoch(epoch)
        self.model.train()
        for batch in self.accelerator.skip_first_batches(self.loader, done * self.job.settings.accumulate):
            losses.append(self._forward_backward(batch, len(losses) % self.job.settings.accumulate))
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            if self.step == self.total:
                break
            if self.job.save_steps and self.step % self.job.save_steps == 0:
                self._save()
        self._log(epoch=epoch + 1, step=self.step, loss=round(sum(losses) / len(losses), 6), seconds=round(time.time() - start, 1))
        self._save()

    def _forward_backward(self, batch: Batch, part: int) -> float:
        job, accelerator = self.job, self.accelerator
        if job.before_step is not None and part == 0:
            job.before_step(self.step, self.total)
        torch.manual_seed(hash((job.seed, self.step, part, accelerator.process_index)))
        with accelerator.accumulate(self.model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=job.settings.mixed_precision == "bf16"):
                loss = job.loss(self.model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.weights, job.settings.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return loss.item()

    # ---- checkpoints: a folder appears under its name when it is whole, then the one before goes ----

    def _save(self) -> None:
        final, staging = self.job.folder / f"{CHECKPOINT}{self.step}", self.job.folder / STAGING
        if final.exists():
            return
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
        if found := checkpoints(self.job.folder):
            self.accelerator.load_state(str(found[-1]))
            self.step = _step_of(found[-1])

    def _log(self, **values: float) -> None:
        if self.accelerator.is_main_process:
            with (self.job.folder / LOG).open("a") as file:
                file.write(json.dumps(values) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a job's folder, the oldest first."""
    return sorted(folder.glob(f"{CHECKPOINT}*"), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


# ---- parts ----


class Batches(Sampler[list[int]]):
    """Row numbers of each batch, drawn anew for each epoch from the seed and the epoch alone.

    Rows are shuffled, sorted by length in chunks of 32 batches, cut, and the batches shuffled: little padding, no
    order by length. Equal lengths make it a plain shuffle.

    >>> batches = Batches([3, 9, 3, 9], batch_size=2, seed=0)
    >>> sorted(sorted(batch) for batch in batches)
    [[0, 2], [1, 3]]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.drop_last = False  # accelerate reads both when it deals batches out to processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        chunk = CHUNK * self.batch_size
        order = [i for start in range(0, len(order), chunk) for i in sorted(order[start : start + chunk], key=lambda i: self.lengths[i])]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


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


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error where there is one logit (regression), else cross-entropy; in float32."""
    if logits.shape[-1] == 1:  # [rows, 1]
        return functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    return functional.cross_entropy(logits.float(), labels)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``temperature² * KL(softmax(teacher / temperature) ‖ softmax(logits / temperature))`` (Hinton et al., 2015).

    Squared error for one logit.
    """
    if logits.shape[-1] == 1:
        return functional.mse_loss(logits.float(), teacher.float())
    student, target = (functional.log_softmax(x.float() / temperature, dim=-1) for x in (logits, teacher))
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch's labels."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return task_loss(model(**inputs).logits, batch["labels"])


def distilled_loss(teacher: nn.Module, weight: float, temperature: float) -> Loss:
    """The loss of labels and teacher together, as :class:`recipes.recipe.Distillation` writes it."""
    teacher.eval()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        with torch.no_grad():
            target = teacher(**inputs).logits
        return (1 - weight) * task_loss(logits, batch["labels"]) + weight * distillation_loss(logits, target, temperature)

    return loss
