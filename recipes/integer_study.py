"""What training in integers costs: tasks by bit widths by seeds, and what rounding, widths apart and LayerNorm do to it.

    python recipes/integer_study.py --tasks mrpc rte --variants float 16 8 --seeds 1000 1001 1002 --dataset FOLDER

Each run is a line of ``docs/integer_training.csv``, written when it is measured; lines that are there are not measured again, and a run
that was killed goes on from its last checkpoint. ``docs/integer_training.md``, its plot and the README's table are made from the lines.
``--csv`` writes other files: so a line is measured once more, to compare. Several processes may share a
file, as long as no two are at the same task and seed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

import quantsim
from model_zoo.marked import in_marks
from model_zoo.publish import RESULTS
from quantsim import IntegerConfig
from quantsim.config import near
from quantsim.rewrites.integer_training.config import OPERANDS
from recipes import integer_finetune
from recipes.lines import Row, locked, read_lines, write_lines
from recipes.tasks import RecipeError, find_task

ROOT = Path(__file__).resolve().parents[1]
CSV, README, MARKS = ROOT / "docs" / "integer_training.csv", ROOT / "README.md", "accuracy of training in integers"
TASKS = ("rte", "mrpc", "stsb", "cola", "sst2")
SUBSET = {"sst2": 10_000}  # training rows, the first of the split
SEEDS = (1000, 1001, 1002)

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
PUBLISHED = {"16": 0.0, "10": -0.5, "8": -1.7}
"""Mean over tasks less FP32's, of BERT-base (Tayaranian et al. 2022, arXiv 2209.09815, v1)."""

KEY = ("task", "variant", "seed")
FIELDS = (*KEY, "metric", "rows", "train_rows", "value", "weight_bits", "activation_bits", "gradient_bits", "roundings", "exponents", "ops",
          "epochs", "lr", "batch", "seconds", "date", "quantsim", "torch", "transformers")  # fmt: skip


# ---- measure ----


def measure(task: str, name: str, seed: int, folder: Path, flags: Sequence[str]) -> Row:
    """Train and evaluate one cell; runs of a task and a seed share a folder, and with it what was trained before.

    Raises:
        RecipeError: the run ended with an error, which it printed.
    """
    output, config = folder / f"{task}-{seed}", VARIANTS[name].config
    subset = ["--max_train_rows", str(SUBSET[task])] if task in SUBSET else []
    given = ["--task", task, "--seed", str(seed), "--output_dir", str(output), *subset, *config_flags(config), *flags]
    if integer_finetune.main(given):
        raise RecipeError(f"{task}, {name}, seed {seed}: the run failed; its message is above")
    found = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    if found["integer"] != json.loads(json.dumps(config and asdict(config))):
        raise RecipeError(f"{output}: another run wrote its results there meanwhile; let one process at a time be at a task and seed")
    return row_of(task, name, seed, found)


def config_flags(config: IntegerConfig | None) -> list[str]:
    if config is None:
        return ["--float"]
    flags = ["--no-measure-float", "--exponents", config.exponents, "--ops", *config.ops]
    for operand in OPERANDS:
        flags += [f"--{operand}_bits", str(config.bits(operand)), f"--{operand}_rounding", config.rounding(operand)]
    return flags


def row_of(task: str, name: str, seed: int, found: Mapping[str, Any]) -> Row:
    """A line, from what the run wrote."""
    metric, config, settings = find_task(task).metric, VARIANTS[name].config, found["recipe"]["finetune"]
    (measured,) = found["metrics"].values()
    limit = found["flags"]["max_train_rows"]
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


# ---- the file ----


def read(path: Path) -> list[Row]:
    return read_lines(path, FIELDS)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The whole file, in the order of tasks, variants and seeds."""
    order = sorted(rows, key=lambda row: (TASKS.index(row["task"]), list(VARIANTS).index(row["variant"]), int(row["seed"])))
    write_lines(path, order, FIELDS)


# ---- what it says ----


def values(rows: Sequence[Row], task: str, variant: str) -> dict[int, float]:
    """Seed → figure."""
    return {int(row["seed"]): float(row["value"]) for row in rows if (row["task"], row["variant"]) == (task, variant)}


def table(rows: Sequence[Row], variants: Mapping[str, Variant]) -> str:
    """A line a variant: each task's mean and standard deviation over seeds, and the mean difference to FP32 of the same tasks and seeds."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    lines = []
    for name, variant in variants.items():
        if not any(row["variant"] == name for row in rows):
            continue
        found = [values(rows, task, name) for task in tasks]
        less = [
            statistics.mean(of[seed] - in_float[seed] for seed in shared)
            for of, in_float in zip(found, (values(rows, task, "float") for task in tasks), strict=True)
            if (shared := of.keys() & in_float.keys())
        ]
        some = "" if len(less) == len(tasks) else f" ({len(less)} of {len(tasks)} tasks)"
        difference = f"{statistics.mean(less):+.2f}{some}" if less else ""
        published = f"{PUBLISHED[name]:+.1f}" if name in PUBLISHED else ""
        lines.append((variant.what, *map(cell, found), "" if name == "float" else difference, published))
    headers = ("", *(f"{task} ({find_task(task).metric})" for task in tasks), "mean − FP32", "the same, published for BERT-base")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * (len(tasks) + 2)))


def cell(found: Mapping[int, float]) -> str:
    """``86.03 ± 0.12 (3)``: mean, standard deviation and number of seeds; of one seed its figure alone."""
    if len(found) < 2:
        return "".join(f"{value:.2f} (1)" for value in found.values())
    return f"{statistics.mean(found.values()):.2f} ± {statistics.stdev(found.values()):.2f} ({len(found)})"


INTRODUCTION = """# Training in integers: what it costs

Written by `python recipes/integer_study.py` from the lines of `integer_training.csv`, each of which is one run, with its settings, versions
and date. The 6-layer MiniLM BERT, every weight trained, by the recipes in `recipes/integer`; evaluated as it was trained, in integers, on
the official validation rows. Tokens and outputs of a weight have exponents of their own where nothing else is said. SST-2 is trained
on the first 10,000 of its rows. A cell is the mean and the standard deviation over seeds, their number in brackets. The last columns
are the mean difference to FP32 over the same tasks and seeds, and what Tayaranian et al. (arXiv 2209.09815, v1) published for
BERT-base, another model on other tasks.
"""


def page(rows: Sequence[Row], picture: str) -> str:
    """The document: widths, then what else was varied, where it was measured."""
    parts = [INTRODUCTION, table(rows, WIDTHS), f"![Differences to FP32 by width]({picture})"]
    if any(row["variant"] in ABLATIONS for row in rows):
        parts += ["## What else was varied", table(rows, {name: VARIANTS[name] for name in ("float", "8", *ABLATIONS)})]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each task's difference to FP32 by width, a point a seed and a line through the means.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError("the plot needs matplotlib: pip install 'quantsim[bench]', or leave it out with --no-plot") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    widths = [name for name in WIDTHS if name != "float"]
    for task in TASKS:
        in_float = values(rows, task, "float")
        points = {w: [v - in_float[seed] for seed, v in values(rows, task, w).items() if seed in in_float] for w in widths}
        at = [i for i, w in enumerate(widths) if points[w]]
        if at:
            (line,) = axes.plot(at, [statistics.mean(points[widths[i]]) for i in at], label=task, marker="o")
            for i in at:
                axes.scatter([i] * len(points[widths[i]]), points[widths[i]], color=line.get_color(), s=12, alpha=0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(widths)), [f"{w} bits" for w in widths])
    axes.set_ylabel("difference to FP32, points")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


# ---- the program ----


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("integer_study.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--tasks", nargs="*", default=TASKS, help=f"of {', '.join(TASKS)}; none of them makes the documents alone")
    parser.add_argument("--variants", nargs="+", default=tuple(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--csv", type=Path, default=CSV, help="the file of lines; page and plot lie beside it")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "integer-study", help="checkpoints")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="leave the plot as it is")
    args, rest = parser.parse_known_args(arguments)
    try:
        for given, known, what in ((args.tasks, TASKS, "--tasks"), (args.variants, VARIANTS, "--variants")):
            if unknown := [name for name in given if name not in known]:
                raise RecipeError(f"{what} {unknown[0]}: expected of {', '.join(known)} (nearest: {near(unknown[0], known, 1)})")
        study(args, rest)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def study(args: argparse.Namespace, flags: Sequence[str]) -> None:
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.variants:
                if any((row["task"], row["variant"], row["seed"]) == (task, name, str(seed)) for row in read(args.csv)):
                    continue
                row = measure(task, name, seed, args.runs, flags)
                with locked(args.csv):  # another process may have written a line meanwhile
                    write(args.csv, [*read(args.csv), row])
    if not (rows := read(args.csv)):
        return
    picture = args.csv.with_suffix(".png")
    if args.plot:
        plot(rows, picture)
    args.csv.with_suffix(".md").write_text(page(rows, picture.name), encoding="utf-8")
    if args.csv.resolve() == CSV:
        README.write_text(in_marks(README.read_text(encoding="utf-8"), MARKS, table(rows, WIDTHS)), encoding="utf-8")
    print(table(rows, {name: v for name, v in VARIANTS.items() if any(row["variant"] == name for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
