"""What quantization costs without training: every range estimator and post-training method on the published FP32 checkpoints.

    python recipes/post_training.py --dataset FOLDER

Each figure is a line of ``docs/post_training.csv``, written when it is measured; lines that are there are not measured again, so a
run that was stopped goes on where it stopped, and a checkpoint that was published anew is measured anew (its hash is in the line).
``docs/post_training.md`` is the page of what was measured on the validation rows.

``--split train`` measures on training rows that calibration did not see, to choose settings; such lines are no part of the table.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import quantsim
from model_zoo.format import FP32
from quantsim import CalibrationError, CheckpointError, ConfigError, PostTraining, QuantConfig, QuantSim, Rule, TraceError
from quantsim.config import EstimatorName, near
from quantsim.graph.roles import RESIDUAL
from recipes.artifacts import Artifact, resolve
from recipes.data import encode, load_rows
from recipes.evaluation import evaluate
from recipes.hub import go_offline
from recipes.lines import Row, read_lines, write_lines
from recipes.tasks import PREFIX, RecipeError, Task, task_of

CSV = Path(__file__).resolve().parent.parent / "docs" / "post_training.csv"
TASKS = ("rte", "mrpc", "stsb", "cola", "sst2")
PRESET, ROWS, BATCH, SEED = "aimet", 64, 16, 1000
EVAL_BATCH = 32
SEARCH_EDGES = 12


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        what: for the reader.
        estimator: of the activations.
        changes: of the residual stream's quantizers: the norms, the sums, and the linears that are added.
        post_training: what calibration does to weights.
        search: then so many edges get 16 bits, found by search on the first calibration batch.
    """

    what: str
    estimator: EstimatorName = "min_max"
    changes: Mapping[str, Any] | None = None
    post_training: PostTraining = field(default_factory=PostTraining)
    search: int | None = None

    def config(self) -> QuantConfig:
        config = QuantConfig.preset(PRESET)
        assert config.activations is not None
        config = replace(config, activations=replace(config.activations, estimator=self.estimator), post_training=self.post_training)
        return config if self.changes is None else config.with_rules(Rule(op=RESIDUAL, role="activation", set=self.changes))


GROUPS = {"axis": -1, "groups": 6}
METHODS = {
    "min_max": Method("range: min-max"),
    "running_min_max": Method("range: running min-max", "running_min_max"),
    "percentile": Method("range: percentile 99.99", "percentile"),
    "mse": Method("range: MSE", "mse"),
    "sqnr": Method("range: SQNR", "sqnr"),
    "smooth": Method("outliers scaled down, α = 0.5", post_training=PostTraining(smooth=0.5)),
    "smooth_percentile": Method("the same, percentile", "percentile", post_training=PostTraining(smooth=0.5)),
    "groups": Method("6 groups of channels in the residual stream", changes=GROUPS),
    "groups_percentile": Method("the same, percentile", "percentile", changes=GROUPS),
    "bits_rule": Method("16 bits in the residual stream, by rule", changes={"bits": 16}),
    "bits_search": Method(f"16 bits for {SEARCH_EDGES} edges, by search", search=SEARCH_EDGES),
    "adaround": Method("AdaRound, 300 steps", post_training=PostTraining(adaround=300)),
    "bias_correction": Method("bias correction", post_training=PostTraining(bias_correction=True)),
    "bias_correction_percentile": Method("the same, percentile", "percentile", post_training=PostTraining(bias_correction=True)),
    "smooth_bias_correction": Method("scaled down, biases corrected", post_training=PostTraining(smooth=0.5, bias_correction=True)),
    "all": Method("scaled down, AdaRound, biases corrected", post_training=PostTraining(0.5, 300, True)),
}

KEY = ("task", "method", "split", "rows", "seed", "fp32_sha256")
FIELDS = (*KEY, "metric", "fp32", "value", "loss", "wide_edges", "preset", "calibration_rows", "seconds", "date", "quantsim", "torch",
          "transformers")  # fmt: skip


# ---- measure ----


@dataclass
class Bench:
    """A task's checkpoint and rows, encoded."""

    task: Task
    artifact: Artifact
    model: PreTrainedModel
    batches: list[dict[str, Tensor]]
    encoded: Dataset
    rows: Dataset
    split: str

    def score(self, model: torch.nn.Module, description: str) -> float:
        result = evaluate(model, self.encoded, self.task, rows=self.rows, batch_size=EVAL_BATCH, description=description)
        return result.metrics[self.task.metric]

    def key(self, method: str) -> Row:
        values = (self.task.name, method, self.split, len(self.rows), SEED, self.artifact.hashes[FP32])
        return dict(zip(KEY, map(str, values), strict=True))


def bench_of(name: str, dataset: str | None, split: str, max_rows: int | None) -> Bench:
    """Load what a task needs. Calibration rows are those of ``recipes/bert_qat.py``: the first 64 that the seed draws."""
    task = task_of(PREFIX + name)
    artifact = resolve(PREFIX + name, None, task)
    model = artifact.load_float()
    tokenizer = artifact.tokenizer(model.config.vocab_size)
    train, _ = load_rows(task, dataset or task.hub_id, "train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED)).tolist()
    if split == "train":
        rows = train.select(order[ROWS : ROWS + (max_rows or 512)])
    else:
        rows = load_rows(task, dataset or task.hub_id, task.splits[0], max_rows=max_rows)[0]
    calibration = encode(train.select(order[:ROWS]), task, tokenizer, artifact.max_length)
    inputs = calibration.select_columns([name for name in tokenizer.model_input_names if name in calibration.column_names])
    batches = [dict(inputs.with_format("torch")[k : k + BATCH]) for k in range(0, len(inputs), BATCH)]
    return Bench(task, artifact, model, batches, encode(rows, task, tokenizer, artifact.max_length), rows, split)


def quantized(bench: Bench, method: Method) -> QuantSim:
    sim = QuantSim(bench.model, method.config())
    sim.compute_encodings(bench.batches)
    if method.search is not None:
        sim = QuantSim(bench.model, sim.search_bits(bench.batches[:1], edges=method.search))
        sim.compute_encodings(bench.batches)
    return sim


def measure(bench: Bench, names: Sequence[str], known: Callable[[Row], Row | None], keep: Callable[[Row], None]) -> None:
    """Every method that is not known yet, kept as soon as it is measured."""
    todo = [name for name in names if known(bench.key(name)) is None]
    if not todo:
        return
    before = next((row for name in METHODS if (row := known(bench.key(name)))), None)
    fp32 = float(before["fp32"]) if before else bench.score(bench.model, f"{bench.task.name} FP32")
    for name in todo:
        began = time.perf_counter()
        sim = quantized(bench, METHODS[name])
        seconds = time.perf_counter() - began
        value = bench.score(sim.model, f"{bench.task.name} {name}")
        wide = sum(q.spec.bits > 8 for q in sim.quantizers.values())
        row = bench.key(name) | {"metric": bench.task.metric, "fp32": f"{fp32:.4f}", "value": f"{value:.4f}", "loss": f"{fp32 - value:.4f}"}
        row |= {"wide_edges": str(wide), "preset": PRESET, "calibration_rows": str(ROWS), "seconds": f"{seconds:.1f}"}
        row |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        row |= {module.__name__: module.__version__ for module in (quantsim, torch, transformers)}
        keep(row)
        print(f"{bench.task.name} {name}: {bench.task.metric} {value:.2f}, FP32 {fp32:.2f}", flush=True)


# ---- the file and the table ----


def read(path: Path) -> list[Row]:
    return read_lines(path, FIELDS)


def write(path: Path, rows: Sequence[Row]) -> None:
    """The whole file, in the order of tasks and methods."""
    order = sorted(rows, key=lambda row: (row["split"] != "validation", TASKS.index(row["task"]), list(METHODS).index(row["method"])))
    write_lines(path, order, FIELDS)


def table(rows: Sequence[Row]) -> str:
    """A line a method, a column a task; the best of each task in bold, and how far it is from FP32."""
    measured = [row for row in rows if row["split"] == "validation"]
    of = {(row["task"], row["method"]): row for row in measured}
    tasks = [task for task in TASKS if any(row["task"] == task for row in measured)]
    best = {task: max(float(row["value"]) for row in measured if row["task"] == task) for task in tasks}
    fp32 = {row["task"]: float(row["fp32"]) for row in measured}

    def cell(task: str, method: str) -> str:
        row = of.get((task, method))
        if row is None:
            return ""
        text = f"{float(row['value']):.2f}"
        return f"**{text}**" if float(row["value"]) == best[task] else text

    def mean(method: str) -> str:
        losses = [float(of[task, method]["loss"]) for task in tasks if (task, method) in of]
        return f"{sum(losses) / len(losses):.2f}" if len(losses) == len(tasks) else ""

    lines = [("FP32", *(f"{fp32[task]:.2f}" for task in tasks), "")]
    lines += [(METHODS[name].what, *(cell(task, name) for task in tasks), mean(name)) for name in METHODS if any(m == name for _, m in of)]
    headers = ("method", *(f"{task} ({task_of(PREFIX + task).metric})" for task in tasks), "mean loss")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * (len(tasks) + 1)))


INTRODUCTION = f"""# Post-training quantization, without training

Written by `python recipes/post_training.py`: what each way of calibrating loses on the published FP32 checkpoints, preset `{PRESET}`,
W8A8, {ROWS} training rows to calibrate with (seed {SEED}), measured on the whole validation split of each GLUE task. In lines of
before 2026-11-29 linears summed integers, attention products and softmax floats; since then both are exact. The best of each column is
bold. The lines are in `post_training.csv`, with the hash of each checkpoint, versions and dates.

- **Ranges** alone: the estimator of activations; weights are min-max a row.
- **Scaled down** (`--smooth 0.5`): outlier channels are divided by powers of two that are folded into the norm, the linears that are
  added and those that read; the floating-point model stays what it was to the bit.
- **Groups** (`--residual-groups 6`): channels of the residual stream of like width share a range.
- **16 bits** in the residual stream (`--residual-bits 16`), or for the edges that gain most (`--search-edges {SEARCH_EDGES}`).
- **AdaRound** (`--adaround 300`) and **bias correction** (`--bias-correction`) change weights, roundings and biases.

A difference of less than a point is a few rows: RTE has 277, so one row is 0.36 points. The best of a column is the best on the very
rows that it was measured on; a method chosen beforehand gets what its own line says. Negative losses are of this kind.
"""


def page(rows: Sequence[Row]) -> str:
    """The table with what it is, and what the best method of each task leaves of the loss of min-max."""
    return f"{INTRODUCTION}\n{table(rows)}\n\n## The best against min-max\n\n{best_table(rows)}\n"


def best_table(rows: Sequence[Row]) -> str:
    """A line a task: its loss with min-max ranges, with outliers scaled down, and the least, and by which method (the first of equals)."""
    lines = []
    for task in TASKS:
        losses = {row["method"]: float(row["loss"]) for row in rows if (row["task"], row["split"]) == (task, "validation")}
        if "min_max" in losses:
            best = min(losses, key=lambda name: (losses[name], list(METHODS).index(name)))
            smoothed = f"{losses['smooth']:.2f}" if "smooth" in losses else ""
            lines.append((task, f"{losses['min_max']:.2f}", smoothed, f"{losses[best]:.2f}", METHODS[best].what))
    headers = ("task", "loss of min-max", "loss scaled down", "least loss", "method")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 3, "left"))


def current(rows: Sequence[Row]) -> list[Row]:
    """Without lines of checkpoints that were published anew."""
    shas = {task: resolve(PREFIX + task, None, task_of(PREFIX + task)).hashes[FP32] for task in {row["task"] for row in rows}}
    return [row for row in rows if row["fp32_sha256"] == shas[row["task"]]]


# ---- the program ----


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("post_training.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--dataset", help="a folder in the Hub's layout, or a Hub id; by default each task's own")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="what to measure on")
    parser.add_argument("--max_rows", type=int, help="measure on so many rows; 512 of the training rows by default")
    parser.add_argument("--output", type=Path, default=CSV, help="the CSV file; the table lies beside it as .md")
    parser.add_argument("--offline", action="store_true", help="never ask the Hub")
    args = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        for given, known, what in ((args.tasks, TASKS, "--tasks"), (args.methods, METHODS, "--methods")):
            if unknown := [name for name in given if name not in known]:
                raise RecipeError(f"{what} {unknown[0]}: expected of {', '.join(known)} (nearest: {near(unknown[0], known, 1)})")
        if args.max_rows is not None and args.split == "validation" and args.output.resolve() == CSV.resolve():
            raise RecipeError(f"--max_rows {args.max_rows}: a trial, and {CSV.name} is of all rows; name another file by --output")
        if args.offline:
            go_offline()
        run(args)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    rows = current(read(args.output))

    def known(key: Row) -> Row | None:
        return next((row for row in rows if all(row[name] == key[name] for name in KEY)), None)

    def keep(row: Row) -> None:
        rows.append(row)
        write(args.output, rows)

    for task in args.tasks:
        measure(bench_of(task, args.dataset, args.split, args.max_rows), args.methods, known, keep)
    if rows:
        args.output.with_suffix(".md").write_text(page(rows), encoding="utf-8")
        print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
