"""What training in integers costs: tasks by bit widths by seeds, and what rounding, exponents, widths apart and the choice of ops do.

    python recipes/integer_study.py --tasks mrpc rte --variants float 16 8 --seeds 1000 1001 1002 --dataset FOLDER

Each run is a line of ``docs/integer_training.csv``, written when it is measured; lines that are there are not measured again, and a run
that was killed goes on from its last checkpoint. ``docs/integer_training.md``, its plot and the README's table are made from the lines.
``--csv`` and ``--runs`` name other files and checkpoints: so a line is trained and measured once more, to compare. Several processes may
share a file, as long as no two are at the same task and seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from model_zoo.marked import in_marks
from model_zoo.publish import PARTIAL
from quantsim.config import near
from recipes.integer_cells import ABLATIONS, FIELDS, GLUE, TASKS, VARIANTS, VIT, WIDTHS, Variant, measure, metric_of
from recipes.lines import Row, locked, read_lines, write_lines
from recipes.tasks import RecipeError

ROOT = Path(__file__).resolve().parents[1]
CSV, README = ROOT / "docs" / "integer_training.csv", ROOT / "README.md"
MARKS, VIT_MARKS = "accuracy of training in integers", "accuracy of a vision transformer trained in integers"
SEEDS = (1000, 1001, 1002)
PUBLISHED = {"16": 0.0, "10": -0.5, "8": -1.7}
"""Mean over tasks less FP32's, of BERT-base (Tayaranian et al. 2022, arXiv 2209.09815, v1)."""

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


def table(rows: Sequence[Row], variants: Mapping[str, Variant], tasks: Sequence[str], published: Mapping[str, float] | None = None) -> str:
    """A line a variant: each task's mean and standard deviation over seeds, and the mean difference to FP32 of the same tasks and seeds.

    Variants and tasks without a line are left out; where there is none of them, the table is empty.
    """
    rows = [row for row in rows if row["task"] in tasks and row["variant"] in variants]
    tasks = [task for task in tasks if any(row["task"] == task for row in rows)]
    if not rows:
        return ""
    lines = []
    for name in (name for name in variants if any(row["variant"] == name for row in rows)):
        found = [values(rows, task, name) for task in tasks]
        less = [
            statistics.mean(of[seed] - in_float[seed] for seed in shared)
            for of, in_float in zip(found, (values(rows, task, "float") for task in tasks), strict=True)
            if (shared := of.keys() & in_float.keys())
        ]
        some = "" if len(less) == len(tasks) else f" ({len(less)} of {len(tasks)} tasks)"
        line = [variants[name].what, *map(cell, found), f"{statistics.mean(less):+.2f}{some}" if less and name != "float" else ""]
        lines.append(line if published is None else [*line, f"{published[name]:+.1f}" if name in published else ""])
    headers = ["", *(f"{task} ({metric_of(task)})" for task in tasks), "mean − FP32"]
    if published is not None:
        headers.append("the same, published for BERT-base")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Those of the README, by their marks."""
    return {MARKS: table(rows, WIDTHS, GLUE, PUBLISHED), VIT_MARKS: table(rows, WIDTHS, tuple(VIT))}


def ablations(rows: Sequence[Row]) -> str:
    """What else was varied at 8 bits, on the tasks on which it was."""
    varied = [task for task in TASKS if any((row["task"], row["variant"] in ABLATIONS) == (task, True) for row in rows)]
    return table(rows, {name: VARIANTS[name] for name in ("float", "8", *ABLATIONS)}, varied)


def cell(found: Mapping[int, float]) -> str:
    """``86.03 ± 0.12 (3)``: mean, standard deviation and number of seeds; of one seed its figure alone."""
    if len(found) < 2:
        return "".join(f"{value:.2f} (1)" for value in found.values())
    return f"{statistics.mean(found.values()):.2f} ± {statistics.stdev(found.values()):.2f} ({len(found)})"


INTRODUCTION = """# Training in integers: what it costs

Written by `python recipes/integer_study.py` from the lines of `integer_training.csv`, each of which is one run, with its settings, versions
and date. The 6-layer MiniLM BERT, every weight trained, by the recipes in `recipes/integer`; evaluated as it was trained, in integers, on
the official validation rows, on one thread: on more, floating-point sums outside the integer ops have another order, and a figure moves as
it does from seed to seed. Tokens and outputs of a weight have exponents of their own where nothing else is said. SST-2 is trained
on the first 10,000 of its rows. A cell is the mean and the standard deviation over seeds, their number in brackets. The last columns
are the mean difference to FP32 over the same tasks and seeds, and what Tayaranian et al. (arXiv 2209.09815, v1) published for
BERT-base, another model on other tasks.
"""
VIT_INTRODUCTION = """## A vision transformer

Accuracy on the 360 held-out images of scikit-learn's handwritten digits, by `recipes/integer_vit.py`: a ViT of four layers and 64
channels from random weights (`digits`), or from one that was trained on the digits 0 to 4 in FP32 and has a new head
(`digits_fine_tuned`). One image is 0.28 points.
"""


def page(rows: Sequence[Row], picture: str) -> str:
    """The document: widths, then what else was varied, then the vision transformer."""
    glue, vit = tables(rows).values()
    parts = [INTRODUCTION, glue, f"![Differences to FP32 by width]({picture})"]
    if varied := ablations(rows):
        parts += ["## What else was varied", varied]
    if vit:
        parts += [VIT_INTRODUCTION, vit]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


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
    for task in GLUE:
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
        if rest and not set(args.tasks) & set(GLUE):
            raise RecipeError(f"{rest[0]}: unknown here; flags of integer_finetune.py go with one of {', '.join(GLUE)}")
        given_flags = {word.partition("=")[0].replace("_samples", "_rows") for word in rest}  # --max_train_samples is --max_train_rows
        trial = [name for name in PARTIAL if f"--{name}" in given_flags]
        if trial and args.csv.resolve() == CSV:
            raise RecipeError(f"--{trial[0]}: a trial, and {CSV.name} holds whole runs; name another file by --csv")
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
        text = README.read_text(encoding="utf-8")
        for marks, made in tables(rows).items():
            text = in_marks(text, marks, made)
        README.write_text(text, encoding="utf-8")
    print("\n\n".join(made for made in (*tables(rows).values(), ablations(rows)) if made))


if __name__ == "__main__":
    sys.exit(main())
