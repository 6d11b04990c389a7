"""What the zoo's checkpoints score on each engine, and how fast: FP32 against W8A8 in one run an engine.

    pip install -e ".[bench]" && python -m benchmarks.engines.accuracy --dataset FOLDER

Writes ``accuracy.csv`` and ``accuracy.md`` beside this file.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from recipes.artifacts import resolve
from recipes.backends import BACKENDS
from recipes.bert_quanteval import measure
from recipes.data import load_rows
from recipes.evaluation import Evaluation
from recipes.tasks import RecipeError, task_of

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.engines.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True, help="GLUE: a folder in the Hub's layout, or a Hub id")
    parser.add_argument("--configs", nargs="+", default=["bert_w8a8_rte", "bert_w8a8_sst2"])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--max_rows", type=int, help="only the first so many rows")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args(arguments)
    rows = [row for config in args.configs for row in scores(config, args.dataset, args.backends, args.max_rows)]
    with (args.output / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.output / "accuracy.md").write_text(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f") + "\n")
    return 0


def scores(config: str, dataset: str, backends: Sequence[str], max_rows: int | None) -> Iterator[dict[str, Any]]:
    """A row a backend; predictions are compared with the simulation's."""
    task = task_of(config)
    artifact = resolve(config, None, task, None)
    splits = [load_rows(task, dataset, task.splits[0], max_rows=max_rows)]
    simulated: Evaluation | None = None
    for backend in ["simulated", *(name for name in backends if name != "simulated")]:
        try:
            (result,), _ = measure(task, artifact, splits, 8, backend=backend)
        except RecipeError as error:
            print(f"{config}: {backend} is left out: {error}", file=sys.stderr)
            continue
        simulated = simulated or result.w8a8
        same = np.asarray(result.w8a8.predictions) == np.asarray(simulated.predictions)
        yield {
            "checkpoint": config,
            "W8A8 runs": backend,
            "rows": result.w8a8.rows,
            "metric": task.metric,
            "FP32": round(result.fp32.metrics[task.metric], 2),
            "W8A8": round(result.w8a8.metrics[task.metric], 2),
            "predictions as simulated": f"{same.sum()} of {same.size}",
            "largest logit difference": round(float(np.abs(result.w8a8.logits - simulated.logits).max()), 3),
            "times FP32 torch": round(result.fp32.seconds / result.w8a8.seconds, 2),
        }


if __name__ == "__main__":
    sys.exit(main())
