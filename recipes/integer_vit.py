"""Train a vision transformer on handwritten digits in integers of 4 to 16 bits, from scratch or fine-tuned, and measure it.

    python recipes/integer_vit.py --weight_bits 8 --activation_bits 8 --gradient_bits 8
    python recipes/integer_vit.py --start fine-tuned --weight_bits 8 --activation_bits 8 --gradient_bits 8

The data are the 1,797 images of 8 x 8 pixels that scikit-learn brings (Alpaydin and Kaynak, 1998); a fifth of them, the same share of
each digit, are held out and measured on. Every linear, norm and the convolution that cuts patches are in integers. ``--start fine-tuned``
trains the digits 0 to 4 in floating point first, and then all ten in integers under a new head. ``--float`` trains without integers, to
compare with. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

from model_zoo.publish import write_results
from quantsim import ConfigError, FixedPointError, IntegerConfig, IntegerTraining, TraceError
from recipes.integer_finetune import MODEL, add_integer_flags, integer_config, write_model
from recipes.losses import Batch, label_loss
from recipes.metrics import score
from recipes.recipe import Training
from recipes.run import key_of
from recipes.tasks import RecipeError, Task
from recipes.training import Job, train

DIGITS = Task("digits", ("image",), ("accuracy",), num_labels=10)
SHAPE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": DIGITS.num_labels,
}
KNOWN_BEFORE = 5  # the digits below it are learned first, for fine-tuning
SCRATCH, FINE_TUNED = "scratch", "fine-tuned"
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the only bars are the stages'
    try:
        args = parse(arguments)
        config = None if args.float else integer_config(args)
        settings = Training(lr=args.lr, epochs=args.epochs, batch=args.batch, weight_decay=args.weight_decay, mixed_precision="no")
        metrics = follow(args, config, settings)
    except (RecipeError, ConfigError, TraceError, FixedPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{tabulate(metrics.items(), ('digits', 'accuracy'), floatfmt='.2f')}\n\nmodel: {args.output_dir / MODEL}")
    return 0


def follow(args: argparse.Namespace, config: IntegerConfig | None, settings: Training) -> dict[str, float]:
    """Train, measure on the held-out images in integers and in float, and write weights and results."""
    rows, held_out = digits()
    model, key = new_model(args.seed), key_of("", args.seed, asdict(settings), SHAPE)
    if args.start == FINE_TUNED:
        key = key_of(key, KNOWN_BEFORE)
        _stage(args, "pretrain", key, model, [row for row in rows if row["labels"] < KNOWN_BEFORE], settings)
        fresh = new_model(args.seed + 1)
        model.classifier.load_state_dict(fresh.classifier.state_dict())
    trained: nn.Module = model if config is None else IntegerTraining(model, config).model
    key = key_of(key, config and asdict(config))
    began = time.perf_counter()
    _stage(args, "finetune", key, trained, rows, settings)
    seconds = round(time.perf_counter() - began, 1)
    metrics = {}
    if config is not None:
        metrics[f"integers {config.weight_bits}-{config.activation_bits}-{config.gradient_bits}"] = accuracy(trained, held_out)
    if config is None or args.measure_float:
        metrics["float"] = accuracy(model, held_out)
    if PartialState().is_main_process:
        write_model(args.output_dir / MODEL, model)
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        measured = {name: {DIGITS.metric: value, "rows": len(held_out)} for name, value in metrics.items()}
        set_to = {"recipe": {"finetune": asdict(settings)}, "integer": config and asdict(config), "flags": flags}
        write_results(args.output_dir, {"metrics": measured, "seconds": {"finetune": seconds}, **set_to})
    return metrics


def digits() -> tuple[Rows, Rows]:
    """Images ``[1, 8, 8]`` from -1 to 1 with their digits: four fifths to train on, and a fifth that is held out."""
    found = load_digits()
    images = (found.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(images, found.target, test_size=0.2, stratify=found.target, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return tuple(  # type: ignore[return-value]
        [{"pixel_values": torch.from_numpy(image), "labels": int(label)} for image, label in zip(*part, strict=True)]
        for part in ((train_images, train_labels), (test_images, test_labels))
    )


def new_model(seed: int) -> ViTForImageClassification:
    """A small ViT with random weights: 16 patches of 2 x 2, four layers of 64 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**SHAPE))


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def _stage(args: argparse.Namespace, name: str, key: str, model: nn.Module, rows: Rows, settings: Training) -> None:
    train(
        Job(
            model=model,
            task=DIGITS,
            rows=rows,
            collate=collate,
            loss=label_loss,
            settings=settings,
            folder=args.output_dir / "stages" / f"{name}-{key[:12]}",
            seed=args.seed,
            fused=args.fused,
            device="cpu",
            title=name,
        )
    )


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, batch: int = 90) -> float:
    """In percent. Integers of one exponent a tensor share it over a batch, so the batch size is part of what is measured."""
    model.eval()
    logits: list[Tensor] = [model(pixel_values=collate(rows[i : i + batch])["pixel_values"]).logits for i in range(0, len(rows), batch)]
    found = torch.cat(logits).argmax(dim=1).numpy()
    return float(score(DIGITS, found, np.array([row["labels"] for row in rows]))["accuracy"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    paragraphs = __doc__.split("\n\n")
    parser = argparse.ArgumentParser("integer_vit.py", description=paragraphs[0], epilog=paragraphs[2], allow_abbrev=False)
    parser.add_argument("--start", choices=(SCRATCH, FINE_TUNED), default=SCRATCH, help="random weights, or a model that knows 0 to 4")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / "integer_vit", help="checkpoints, model and results.json")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1000)
    add_integer_flags(parser)
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="don't compile elementwise kernels")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
