"""Train a recipe with several seeds; report median and spread, as Bondarenko et al. (2021) do.

    python recipes/sweep.py --recipe recipes/bert_w8a8/rte.yaml --seeds 1000 1001 1002 1003 1004 --dataset FOLDER

Every other flag is passed on to bert_qat.py. Each seed has a folder of its own (``seed-1000`` …), and goes on where it was killed;
``sweep.json`` lies in each of them, so that publishing one publishes the spread too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model_zoo.cards import read_card
from model_zoo.format import MEASURED
from model_zoo.publish import SWEEP
from recipes import bert_qat
from recipes.reading import read_recipe
from recipes.tasks import RecipeError, find_task

SEEDS = (1000, 1001, 1002, 1003, 1004)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or the exit code of the first run that failed."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("sweep.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file, as recipes/bert_w8a8/rte.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: those of the paper")
    parser.add_argument("--output_dir", type=Path, help="default runs/<the recipe's name>-sweep")
    args, rest = parser.parse_known_args(arguments)
    try:
        recipe = read_recipe(args.recipe)
        metric = find_task(recipe.task).metric
        if len(set(args.seeds)) != len(args.seeds):
            raise RecipeError(f"--seeds {' '.join(map(str, args.seeds))}: expected each once")
        if "--stage=fp32" in rest or ("--stage", "fp32") in itertools.pairwise(rest):
            raise RecipeError("--stage fp32: writes no bundle, and a sweep compares those; leave it out")
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = args.output_dir or Path("runs") / f"{recipe.name}-sweep"
    folders = [output / f"seed-{seed}" for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders, strict=True):
        print(f"\nseed {seed}: {folder}", flush=True)
        if code := bert_qat.main(["--recipe", str(args.recipe), *rest, "--seed", str(seed), "--output_dir", str(folder)]):
            return code
    sweep = summary(args.seeds, [read_card(folder / "bundle").metrics for folder in folders], metric)
    for folder in folders:
        (folder / SWEEP).write_text(json.dumps(sweep, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(sweep, metric))
    return 0


def summary(seeds: Sequence[int], metrics: Sequence[Mapping[str, Mapping[str, Any]]], metric: str) -> dict[str, Any]:
    """``Card.sweep``: the headline metric of every seed, with median, least and greatest."""
    found: dict[str, Any] = {"seeds": list(seeds)}
    for what in MEASURED:
        values = [float(of_seed[what][metric]) for of_seed in metrics]
        found[what] = {"values": values, "median": statistics.median(values), "least": min(values), "greatest": max(values)}
    return found


def table(sweep: Mapping[str, Any], metric: str) -> str:
    rows = [[seed, *(sweep[what]["values"][i] for what in MEASURED)] for i, seed in enumerate(sweep["seeds"])]
    rows += [[name, *(sweep[what][name] for what in MEASURED)] for name in ("median", "least", "greatest")]
    return tabulate(rows, ["seed", *(f"{what} {metric}" for what in MEASURED)], floatfmt=".2f")


if __name__ == "__main__":
    sys.exit(main())
