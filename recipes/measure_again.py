"""Measure published checkpoints again and write what was found into their cards: after a change of numerics, or on another machine.

    python recipes/measure_again.py --dataset FOLDER bert_w8a8_rte bert_w8a8_stsb

The files stay; FP32, PTQ with each estimator of the recipe and QAT are measured as recipes/bert_qat.py does. A card is written when all
of its figures are there. ``python -m model_zoo results`` then writes the README's table. Exit code 2 with one paragraph that says what to
set right.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model_zoo.cards import Card, find, published, read_card, write_card
from model_zoo.publish import PARTIAL
from quantsim import CalibrationError, CheckpointError, ConfigError, TraceError
from recipes.artifacts import resolve
from recipes.backends import SIMULATED, on_backend
from recipes.bert_qat import add_flags, prepare
from recipes.quantized_stages import compare_estimators, quantize
from recipes.reading import build
from recipes.recipe import Recipe
from recipes.results import versions
from recipes.tasks import RecipeError, find_task


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("measure_again.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("names", nargs="*", help=f"cards (default: all that are published, {', '.join(published())})")
    parser.add_argument("--checkpoint", type=Path, help="the folder of one bundle, in place of a card's name")
    parser.add_argument("--dataset", help="a folder in the Hub's layout, or a Hub id; by default the recipe's")
    add_flags(parser)
    parser.set_defaults(output_dir=None)
    args = parser.parse_args(arguments)
    try:
        for name in args.names or ([""] if args.checkpoint else published()):
            measure_again(name, args)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_again(name: str, args: argparse.Namespace) -> Card:
    """Measure one card's files and write its figures, with today's date and versions.

    Raises:
        RecipeError: figures on a part of the rows, which a card does not take.
    """
    partial = [flag for flag in PARTIAL if getattr(args, flag) is not None]
    if partial:
        raise RecipeError(f"--{partial[0]} {getattr(args, partial[0])}: a card's figures are those of all rows; leave it out")
    found = find(name) if args.checkpoint is None else read_card(args.checkpoint)
    task = find_task(found.task)
    artifact = resolve(found.name, None if args.checkpoint is None else str(args.checkpoint), task)
    recipe = build(Recipe, {**found.hyper_parameters, "intermediate": []})  # nothing is trained
    run = prepare(replace(recipe, dataset=args.dataset or recipe.dataset), args, tokenizer=artifact.tokenizer_source, trains=False)
    run.say(found.name)
    teacher = artifact.load_float()
    run.measure("fp32", teacher)
    compare_estimators(run, teacher)
    for what, sim in (("ptq", quantize(run, teacher)), ("qat", artifact.load_simulation())):
        run.measure(what, on_backend(sim, found.backend))
        if found.backend != SIMULATED:
            run.metrics[what]["backend"] = found.backend
    card = replace(
        found,
        metrics=run.metrics,
        estimators=run.estimators,
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    write_card(card, card.folder)
    return card


if __name__ == "__main__":
    sys.exit(main())
