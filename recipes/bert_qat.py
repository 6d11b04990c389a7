"""Train a W8A8 model by a recipe: fine-tune, calibrate, train quantized, write a bundle and measure what was written.

    python recipes/bert_qat.py --recipe recipes/bert_w8a8/rte.yaml --dataset FOLDER

Every field of the recipe is a flag of its name (``--qat.lr 1e-5``, ``--intermediate.0.epochs 1``, ``--intermediate null``).
A run that was killed goes on where it was; stages whose settings did not change are not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tabulate import tabulate
from transformers.utils import logging as transformers_logging

from model_zoo.cards import Card
from model_zoo.publish import write_bundle, write_results
from quantsim import CalibrationError, CheckpointError, ConfigError, TraceError
from quantsim.cli.command import count
from recipes.base_model import base_state, load_tokenizer
from recipes.data import DataError, load_rows, load_sample, rows_sha256
from recipes.devices import multiplies_bf16, usable_device
from recipes.hub import go_offline, hub_reachable
from recipes.low_rank import low_rank_delta, merged
from recipes.quantized_stages import compare_estimators, quantize, train_quantized
from recipes.reading import read_recipe
from recipes.recipe import Recipe
from recipes.run import Run
from recipes.stages import fine_tune
from recipes.tasks import RecipeError, Task, find_task


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the only bars are the stages'
    try:
        run = prepare(*parse(arguments))
        card = follow(run)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.say("\n" + table(run))
    if card is not None:
        run.say(f"\nbundle: {card.folder} ({sum(record['size'] for record in card.files.values()) / 1e6:.1f} MB)")
    return 0


def follow(run: Run) -> Card | None:
    """Every stage in turn; the card of the bundle that was written, if the stages go so far."""
    model, _, key = fine_tune(run)
    teacher = merged(model)
    if run.args.stage == "fp32":
        run.measure("fp32", teacher)
        if run.processes.is_main_process:
            write_results(run.folder, results(run))
        return None
    base = base_state(run.recipe.base_model, run.task.num_labels, span=run.task.span)
    fp32 = low_rank_delta(model, base)
    compare_estimators(run, model)
    sim = quantize(run, model)
    run.measure("ptq", sim.model)
    train_quantized(run, sim, teacher, key)
    card = write_bundle(run.folder / "bundle", fp32, low_rank_delta(sim.model, base), sim, description(run), run.measure)
    if run.processes.is_main_process:
        write_results(run.folder, results(run))
    return card


# ---- data ----


def prepare(recipe: Recipe, args: argparse.Namespace, *, sample: bool = False, tokenizer: str | None = None, trains: bool = True) -> Run:
    """Find the rows; fold ``--fold`` of the training rows takes the place of the validation rows where it is given.

    Args:
        sample: where no dataset is named and none is at hand, train on a part of the project's own sample and measure on another.
        tokenizer: the folder or Hub id of another than the base model's.
        trains: where the device has no kernels for bf16, train in float32 instead, and say so.
    """
    usable_device(args.device)
    if args.offline:
        go_offline()
    if trains and recipe != recipe.in_float32() and not multiplies_bf16(args.device):
        recipe = recipe.in_float32()
        PartialState(cpu=args.device == "cpu").print("mixed_precision: this CPU has no bf16 kernels; training in float32", file=sys.stderr)
    task = find_task(recipe.task)
    train_rows, eval_rows, split = _rows(recipe, args, task, sample)
    if args.max_train_rows is not None:
        train_rows = train_rows.select(range(min(args.max_train_rows, len(train_rows))))
    if args.max_eval_rows is not None:
        eval_rows = eval_rows.select(range(min(args.max_eval_rows, len(eval_rows))))
    folder = args.output_dir or Path("runs") / recipe.name
    return Run(recipe, args, task, train_rows, eval_rows, split, load_tokenizer(tokenizer or recipe.base_model), folder)


def _rows(recipe: Recipe, args: argparse.Namespace, task: Task, sample: bool) -> tuple[Dataset, Dataset, str]:
    """Rows to train on, rows to measure on, and what the latter are."""
    dataset = recipe.dataset or task.hub_id
    try:
        train_rows, _ = load_rows(task, dataset, recipe.train_split)
    except DataError:
        if not sample or recipe.dataset is not None or hub_reachable():
            raise
        fold = args.fold or 0
        return *in_folds(load_sample(task)[0], task, args.folds, fold), f"the project's own sample, fold {fold} of {args.folds}"
    split = task.splits[0]
    if args.fold is not None:
        train_rows, eval_rows = in_folds(train_rows, task, args.folds, args.fold)
        split = f"fold {args.fold} of {args.folds} of {recipe.train_split}"
    elif recipe.train_split in task.splits:
        raise RecipeError(
            f"train_split: {recipe.train_split} is what {task.name} is measured on; give --fold too, to measure on a part of it"
        )
    else:
        eval_rows, _ = load_rows(task, dataset, split)
    return train_rows, eval_rows, split


def in_folds(rows: Dataset, task: Task, folds: int, fold: int) -> tuple[Dataset, Dataset]:
    """All other folds, and one.

    Rows with the same first text (for spans, context) stay together: what was learned on it cannot be scored on it.
    """
    if not 0 <= fold < folds:
        raise RecipeError(f"--fold {fold}: expected 0 to {folds - 1}, for --folds {folds}")
    shared = task.columns[1] if task.span else task.columns[0]
    of_row = [int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % folds for text in rows[shared]]
    inside = [i for i, k in enumerate(of_row) if k == fold]
    outside = [i for i, k in enumerate(of_row) if k != fold]
    return rows.select(outside), rows.select(inside)


# ---- command line ----


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe with its overrides, and the program's own flags."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("bert_qat.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file, as recipes/bert_w8a8/rte.yaml")
    parser.add_argument("--output_dir", type=Path, help="checkpoints, bundle and results.json; default runs/<the recipe's name>")
    parser.add_argument(
        "--stage", choices=("fp32", "qat", "all"), default="all", help="fine-tune only; quantize only what is fine-tuned; both"
    )
    add_flags(parser)
    args, rest = parser.parse_known_args(arguments)
    return read_recipe(args.recipe, overrides(rest)), args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that follows a recipe."""
    parser.add_argument("--folds", type=count, default=5, help="into how many folds --fold cuts the training rows")
    parser.add_argument("--fold", type=int, help="evaluate on this fold of the training rows and train on the others (to choose settings)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--eval_batch_size", "--per_device_eval_batch_size", type=count, default=8)
    parser.add_argument("--max_steps", type=count, help="optimizer steps of each stage, for trials; default all")
    parser.add_argument("--max_train_rows", "--max_train_samples", type=count, help="of each training set, for trials")
    parser.add_argument("--max_eval_rows", "--max_eval_samples", type=count, help="for trials")
    parser.add_argument("--eval_steps", type=count, help="steps between evaluations during training; default none before the end")
    parser.add_argument("--save_steps", type=count, help="steps between checkpoints; default once an epoch")
    parser.add_argument("--offline", action="store_true", help="never ask the Hub")


def overrides(rest: Sequence[str]) -> dict[str, str]:
    """``["--qat.lr", "1e-5", "--seed=7"]`` → ``{"qat.lr": "1e-5", "seed": "7"}``.

    Raises:
        RecipeError: something that is no flag, or a flag without a value.
    """
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise RecipeError(f"{word!r}: expected a flag, as --qat.lr 1e-5")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise RecipeError(f"--{name}: has no value; fields of the recipe take one, as --qat.lr 1e-5")
        found[name] = value
    return found


# ---- what is written ----


def description(run: Run) -> dict[str, Any]:
    """What the card says beside files and figures."""
    hashes = [rows_sha256(run.task, rows)[:16] for rows in (run.train_rows, run.eval_rows)]
    trained = f"{len(run.train_rows)} training rows (sha256 {hashes[0]}…)"
    measured = f"{len(run.eval_rows)} rows of {run.eval_split} (sha256 {hashes[1]}…)"
    return {
        "recipe": run.recipe,
        "recipe_file": run.args.recipe,
        "task": run.task,
        "data": f"{run.task.hub_id}, {run.task.hub_config}: trained on {trained}, measured on {measured}",
        "metrics": run.metrics,
        "estimators": run.estimators,
    }


def results(run: Run) -> dict[str, Any]:
    """All that was set and all that came out, as plain values."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.args).items()}
    return {"metrics": run.metrics, "estimators": run.estimators, "seconds": run.seconds, "recipe": asdict(run.recipe), "flags": flags}


def table(run: Run) -> str:
    names = [name for name in next(iter(run.metrics.values())) if name not in ("rows", "split")]
    found = [[what, *(values[name] for name in names), values["rows"], values["split"]] for what, values in run.metrics.items()]
    return tabulate(found, [f"{run.recipe.name}", *names, "rows", "split"], floatfmt=".2f")


if __name__ == "__main__":
    sys.exit(main())
