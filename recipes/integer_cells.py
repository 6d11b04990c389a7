"""What the study of integer training measures: tasks, widths and what else is varied, and how one cell is measured."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import quantsim
from model_zoo.publish import RESULTS
from quantsim import IntegerConfig
from quantsim.rewrites.integer_training.config import OPERANDS
from recipes import integer_finetune, integer_vit
from recipes.lines import Row
from recipes.tasks import RecipeError, find_task

GLUE = ("rte", "mrpc", "stsb", "cola", "sst2")
VIT = {"digits": integer_vit.SCRATCH, "digits_fine_tuned": integer_vit.FINE_TUNED}
"""Name → the start that ``integer_vit.py`` is given."""
TASKS = (*GLUE, *VIT)
SUBSET = {"sst2": 10_000}  # training rows, the first of the split

EIGHT = IntegerConfig()


@dataclass(frozen=True)
class Variant:
    """One line of the table: what is for the reader, and what is in integers (``None``: nothing)."""

    what: str
    config: IntegerConfig | None


WIDTHS = {"float": Variant("FP32", None)} | {
    str(bits): Variant(f"{bits} bits", IntegerConfig(weight_bits=bits, activation_bits=bits, gradient_bits=bits))
    for bits in (16, 12, 10, 8)
}
ABLATIONS = {
    "8_tensor": Variant("8 bits, one exponent a tensor, as published", replace(EIGHT, exponents="tensor")),
    "8_stochastic": Variant(
        "8 bits, all rounded stochastically", replace(EIGHT, weight_rounding="stochastic", activation_rounding="stochastic")
    ),
    "8_nearest": Variant("8 bits, all rounded to the nearest", replace(EIGHT, gradient_rounding="nearest")),
    "8_activation_16": Variant("8 bits, activations 16", replace(EIGHT, activation_bits=16)),
    "8_gradient_16": Variant("8 bits, gradients 16", replace(EIGHT, gradient_bits=16)),
    "8_float_norm": Variant("8 bits, LayerNorm in floating point", replace(EIGHT, ops=tuple(op for op in EIGHT.ops if op != "layer_norm"))),
    "8_matmul": Variant("8 bits, attention's products too", replace(EIGHT, ops=(*EIGHT.ops, "matmul"))),
}
VARIANTS = WIDTHS | ABLATIONS
KEY = ("task", "variant", "seed")
FIELDS = (*KEY, "metric", "rows", "train_rows", "value", "weight_bits", "activation_bits", "gradient_bits", "roundings", "exponents", "ops",
          "epochs", "lr", "batch", "seconds", "date", "quantsim", "torch", "transformers")  # fmt: skip


def measure(task: str, name: str, seed: int, folder: Path, flags: Sequence[str]) -> Row:
    """Train and evaluate one cell; runs of a task and a seed share a folder, and with it what was trained before.

    Args:
        flags: more of them for ``integer_finetune.py``; ``integer_vit.py`` is given none.

    Raises:
        RecipeError: the run ended with an error, which it printed.
    """
    output, config = folder / f"{task}-{seed}", VARIANTS[name].config
    given = ["--seed", str(seed), "--output_dir", str(output), *config_flags(config)]
    if task in VIT:
        failed = integer_vit.main(["--start", VIT[task], *given])
    else:
        subset = ["--max_train_rows", str(SUBSET[task])] if task in SUBSET else []
        failed = integer_finetune.main(["--task", task, *subset, *given, *flags])
    if failed:
        raise RecipeError(f"{task}, {name}, seed {seed}: the run failed; its message is above")
    found = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    if found["integer"] != json.loads(json.dumps(config and asdict(config))):
        raise RecipeError(f"{output}: another run wrote its results there meanwhile; let one process at a time be at a task and seed")
    return row_of(task, name, seed, found)


def config_flags(config: IntegerConfig | None) -> list[str]:
    """What gives both programs this configuration; a model in integers is measured there alone."""
    if config is None:
        return ["--float"]
    flags = ["--no-measure-float", "--exponents", config.exponents, "--ops", *config.ops]
    for operand in OPERANDS:
        flags += [f"--{operand}_bits", str(config.bits(operand)), f"--{operand}_rounding", config.rounding(operand)]
    return flags


def metric_of(task: str) -> str:
    return (integer_vit.DIGITS if task in VIT else find_task(task)).metric


def row_of(task: str, name: str, seed: int, found: Mapping[str, Any]) -> Row:
    """A line, from what the run wrote."""
    metric, config, settings = metric_of(task), VARIANTS[name].config, found["recipe"]["finetune"]
    (measured,) = found["metrics"].values()
    limit = found["flags"].get("max_train_rows")
    row = {
        "task": task,
        "variant": name,
        "seed": str(seed),
        "metric": metric,
        "rows": str(measured["rows"]),
        "train_rows": "all" if limit is None else str(limit),
        "value": f"{measured[metric]:.4f}",
        **{f"{operand}_bits": str(config.bits(operand)) if config else "" for operand in OPERANDS},
        "roundings": " ".join(config.rounding(operand) for operand in OPERANDS) if config else "",
        "exponents": config.exponents if config else "",
        "ops": " ".join(config.ops) if config else "",
        **{setting: f"{settings[setting]:g}" for setting in ("epochs", "lr", "batch")},
        "seconds": f"{found['seconds']['finetune']:g}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return row | {module.__name__: module.__version__ for module in (quantsim, torch, transformers)}
