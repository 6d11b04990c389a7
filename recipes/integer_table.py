"""What integer-only BERT and Q8BERT scored: ``integer_results.csv``, and what is made of it in ``docs/integers.md`` and the README.

    python recipes/integer_table.py runs/ibert_mrpc runs/q8bert_mrpc

adds what ``ibert_finetune.py`` and ``q8bert.py`` wrote in these folders (in place of an earlier run of the same recipe) and makes the
tables anew; without folders it makes the tables alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model_zoo.marked import in_marks
from model_zoo.publish import PARTIAL
from recipes.lines import Row, read_lines, write_lines
from recipes.tasks import RecipeError, find_task

ROOT = Path(__file__).resolve().parents[1]
CSV, DOCUMENT, README = ROOT / "recipes" / "integer_results.csv", ROOT / "docs" / "integers.md", ROOT / "README.md"
MARKS = "integers"
FIELDS = tuple("name model source task metric rows fp32 before after int8 equal_rows lr epochs seed date".split())
HEADERS = ("system", "task", "metric", "model, source", "rows", "FP32", "before training", "after", "on int8 kernels")
SUMMARY = ("task", "FP32", "I-BERT calibrated", "trained", "Q8BERT calibrated", "trained", "on int8 kernels")
OURS = "measured here"


def main(arguments: Sequence[str]) -> int:
    """Add the runs in these folders, and write all three files."""
    try:
        rows = with_runs(read_lines(CSV, FIELDS), [row_of(Path(folder)) for folder in arguments])
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_lines(CSV, rows, FIELDS)
    for path, made in ((DOCUMENT, table(rows)), (README, summary(rows))):
        path.write_text(in_marks(path.read_text(encoding="utf-8"), MARKS, made), encoding="utf-8")
    return 0


def row_of(folder: Path) -> Row:
    """A run's figures, from the ``results.json`` that it wrote.

    Raises:
        RecipeError: there is none, it is a trial's, or it was not measured to the end.
    """
    path = folder / "results.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recipe, flags, metrics, _ = (found[name] for name in ("recipe", "flags", "metrics", "model"))
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path}: no results of a run ({error})") from error
    if trial := [name for name in PARTIAL if flags.get(name) is not None]:
        raise RecipeError(f"{path}: a run with --{trial[0]} {flags[trial[0]]} is a trial")
    integer_only = "integer" in metrics
    after = metrics.get("integer" if integer_only else "q8bert")
    if after is None:
        raise RecipeError(f"{path}: has {', '.join(metrics)}; run stage integer, or q8bert.py --do_train, to its end")
    metric, settings = find_task(recipe["task"]).metric, recipe["qat" if integer_only else "finetune"]

    def figure(what: str) -> str:
        return f"{metrics[what][metric]:.2f}" if what in metrics else ""

    return {
        "name": recipe["name"],
        "model": found["model"],
        "source": OURS,
        "task": recipe["task"],
        "metric": metric,
        "rows": str(after["rows"]),
        "fp32": figure("fp32"),
        "before": figure("quantized" if integer_only else "calibrated"),
        "after": f"{after[metric]:.2f}",
        "int8": figure("int8"),
        "equal_rows": str(after.get("equal_to_training_form", "")),
        "lr": f"{settings['lr']:g}",
        "epochs": f"{settings['epochs']:g}",
        "seed": str(recipe["seed"]),
        "date": found["date"][:10],
    }


# ---- rows ----


def with_runs(rows: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """The rows, with new ones in the place of those of the same recipe; ours before what others published."""
    names = {row["name"] for row in new}
    kept = [row for row in rows if row["source"] != OURS or row["name"] not in names]
    return sorted([*kept, *new], key=lambda row: (system(row), row["source"] != OURS, row["task"]))


# ---- table ----


def system(row: Mapping[str, str]) -> str:
    return "Q8BERT" if row["name"].startswith("q8bert") else "I-BERT"


def table(rows: Sequence[Row]) -> str:
    lines = [
        (
            system(row),
            row["task"],
            row["metric"],
            f"{row['model']}, {row['source']}",
            *(row[x] for x in ("rows", "fp32", "before", "after", "int8")),
        )
        for row in rows
    ]
    return tabulate(lines, HEADERS, tablefmt="github", disable_numparse=True, colalign=("left",) * 4 + ("right",) * 5)


def summary(rows: Sequence[Row]) -> str:
    """A line a task: what was measured here, of both systems, and the means where there are five tasks."""
    ours = {(system(row), row["task"]): row for row in rows if row["source"] == OURS}
    parts = (("I-BERT", "fp32"), ("I-BERT", "before"), ("I-BERT", "after"), ("Q8BERT", "before"), ("Q8BERT", "after"), ("Q8BERT", "int8"))
    tasks = sorted({task for _, task in ours})
    metrics = {row["task"]: row["metric"] for row in ours.values()}
    lines = [[f"{task}, {metrics[task]}", *(ours.get((name, task), {}).get(part, "") for name, part in parts)] for task in tasks]
    columns = list(zip(*lines, strict=True))[1:]
    means = [f"{sum(map(float, column)) / len(column):.2f}" if all(column) else "" for column in columns]
    return tabulate(
        [*lines, ["mean", *means]], SUMMARY, tablefmt="github", disable_numparse=True, colalign=("left", *("right",) * len(parts))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
