"""The flags of ``transformers``' ``run_glue.py``, as fields of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from recipes.bert_qat import add_flags

TRAINING = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch",
    "weight_decay": "weight_decay",
    "warmup_ratio": "warmup_ratio",
    "lr_scheduler_type": "schedule",
}
"""Its flags → fields of the stage that is trained."""
WHOLE = {"max_seq_length": "max_length", "seed": "seed", "dataset_name": "dataset"}
"""Its flags → fields of the recipe."""
ALIASES = {"per_device_train_batch_size": ["per_gpu_train_batch_size"], "dataset_name": ["dataset", "data_dir"]}


def add_glue_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that follows a recipe, and those of ``run_glue.py``."""
    add_flags(parser)
    for flag, name in (TRAINING | WHOLE).items():
        names = [f"--{flag}", *(f"--{alias}" for alias in ALIASES.get(flag, []))]
        parser.add_argument(*names, dest=flag, metavar="VALUE", help=f"the recipe's {name}")


def glue_overrides(args: argparse.Namespace, stage: str) -> Mapping[str, str]:
    """``--learning_rate 1e-6`` → ``{"qat.lr": "1e-6"}`` for the stage ``qat``."""
    names = {flag: f"{stage}.{name}" for flag, name in TRAINING.items()} | WHOLE
    return {name: value for flag, name in names.items() if (value := getattr(args, flag)) is not None}
