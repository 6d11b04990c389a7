"""The quantized stages: calibrate, and train weights and ranges together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from quantsim import QuantSim, State
from quantsim.config import EstimatorName
from recipes.base_model import set_dropouts
from recipes.losses import TEACHER, Loss, distilled_loss, label_loss
from recipes.recipe import Qat
from recipes.run import Run, key_of
from recipes.teacher import teach

Calibrate = Callable[[QuantSim], None]


def quantize(run: Run, model: PreTrainedModel, estimator: EstimatorName | None = None) -> QuantSim:
    """The simulation of a copy of ``model``, calibrated."""
    recipe = run.recipe
    model = copy.deepcopy(model)
    set_dropouts(model, recipe.qat.hidden_dropout, recipe.qat.attention_dropout)
    model.train(False)
    sim = QuantSim(model.to(run.args.device), recipe.quantization.config(estimator), in_place=True)
    began = time.perf_counter()
    calibrate(run, sim)
    run.seconds["calibrate"] = round(time.perf_counter() - began, 1)
    return sim


def calibrate(run: Run, sim: QuantSim) -> None:
    """Find all ranges on training rows that the seed draws; with several processes each sees a part of the batches."""
    ranges = run.recipe.quantization.calibration
    order = torch.randperm(len(run.train_rows), generator=torch.Generator().manual_seed(run.recipe.seed))[: ranges.rows]
    rows = run.encoded(run.task, run.train_rows.select(order.tolist()), padded=True)
    collate = run.collator(padded=True)
    starts = range(0, len(rows), ranges.batch)[run.processes.process_index :: run.processes.num_processes]
    sim.compute_encodings([dict(collate(rows[k : k + ranges.batch])) for k in starts])


def compare_estimators(run: Run, model: PreTrainedModel) -> None:
    """PTQ with each range estimator that the recipe asks for, measured."""
    for estimator in run.recipe.quantization.compare_estimators:
        result = run.evaluate(quantize(run, model, estimator).model, f"evaluate ptq {estimator}")
        run.estimators[estimator] = dict(result.metrics)
        run.say(f"ptq {estimator}: " + ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items()))


def train_quantized(run: Run, sim: QuantSim, teacher: PreTrainedModel, key: str) -> None:
    """QAT of weights and ranges; the ranges are fixed for the last part, and afterwards."""
    settings = run.recipe.qat
    padded = run.task.span or sim.config.mask_clamp is not None  # with the mask as it is, padding changes no logit
    rows = run.encoded(run.task, run.train_rows, padded=run.task.span)
    key = run.stage_key(key_of(key, asdict(run.recipe.quantization.calibration), sim.config.to_dict()), "qat", settings, rows)
    loss: Loss = label_loss
    if settings.distillation is not None:
        loss = distilled_loss(settings.distillation.weight, settings.distillation.temperature)
        taught = teach(run, teacher, rows, settings, run.stage_folder("qat", key))
        rows = [{**row, TEACHER: logits} for row, logits in zip(rows, taught.tolist(), strict=True)]
    for quantizer in sim.quantizers.values():
        quantizer.lsq_gradients = settings.range_gradient == "lsq"
    ranges: dict[str, Any] = {"ranges": sim.range_parameters(), "range_lr": settings.range_lr}
    schedule = range_schedule(sim, settings, lambda sim: calibrate(run, sim))
    run.stage("qat", key, sim.model, rows, settings, loss=loss, padded=padded, fused=settings.fused, before_step=schedule, **ranges)
    sim.freeze_ranges()


def range_schedule(sim: QuantSim, settings: Qat, calibrate: Calibrate) -> Callable[[int, int], None]:
    """What happens to the quantizers before each step: off during the delay, then calibrated and learning, at last fixed."""

    def before_step(step: int, total: int) -> None:
        start = round(total * settings.delay)
        if step < start:
            for quantizer in sim.quantizers.values():
                quantizer.state = State.OFF
        elif step == start > 0:
            calibrate(sim)
        if step >= max(start, total * (1 - settings.freeze_ranges_last)) and sim.range_parameters():
            sim.freeze_ranges()

    return before_step
