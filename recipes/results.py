"""What an evaluation is written down as: the printed table and ``results.json``."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import scipy
import sklearn
import torch
import transformers
from tabulate import tabulate

import quantsim
from recipes.artifacts import Artifact
from recipes.data import DataSource
from recipes.evaluation import Evaluation
from recipes.metrics import agreement
from recipes.tasks import RecipeError, Task

RESULTS = "results.json"
HEADERS = ("data", "metric", "FP32", "W8A8", "difference", "agreement", "examples", "seconds FP32", "seconds W8A8")
RIGHT = ("left", "left") + ("right",) * 7


@dataclass(frozen=True)
class SplitResult:
    """Both models on one split."""

    source: DataSource
    sha256: str
    fp32: Evaluation
    w8a8: Evaluation

    def agreement(self, task: Task) -> float:
        return agreement(task, self.fp32.predictions, self.w8a8.predictions)


def table(task: Task, results: Sequence[SplitResult]) -> str:
    """A row a split and metric. Metrics in percent, differences in points."""
    rows = []
    for result in results:
        counts = (_agreement(task, result), result.fp32.rows, f"{result.fp32.seconds:.1f}", f"{result.w8a8.seconds:.1f}")
        for name in task.metrics:
            first = name == task.metric  # what holds for the split is said once
            before, after = result.fp32.metrics[name], result.w8a8.metrics[name]
            figures = (name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
            rows.append((result.source.label if first else "", *figures, *(counts if first else [""] * len(counts))))
    return tabulate(rows, headers=HEADERS, tablefmt="github", colalign=RIGHT, disable_numparse=True)


def _agreement(task: Task, result: SplitResult) -> str:
    value = result.agreement(task)
    return f"mean |Δ| {value:.3f}" if task.regression else f"{value:.1f} %"


def notes(task: Task, results: Sequence[SplitResult], artifact: Artifact, missing: Sequence[str]) -> list[str]:
    """The lines under the table: which data, which models, what is not in it."""
    lines = [f"data: {result.source}; rows sha256 {result.sha256[:12]}…" for result in results]
    lines += [f"not in this dataset: {split}" for split in missing]
    lines += [
        f"checkpoint: {artifact.name}; FP32 is {artifact.fp32_is}",
        f"base model: {artifact.base_model}; rows padded to {artifact.max_length} tokens",
    ]
    if artifact.card:
        lines.append(f"the card's figures: {_card_figures(task, artifact.card.metrics)}")
    if any(result.source.kind == "sample" for result in results):
        lines.append("THIS IS THE PROJECT'S OWN SAMPLE, NOT THE BENCHMARK: compare it with nothing published")
    return lines


def _card_figures(task: Task, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, figures in metrics.items():
        value = figures.get(task.metric)
        if isinstance(value, int | float):
            parts.append(f"{name.upper()} {task.metric} {value:.2f} on {figures.get('rows', '?')} rows of {figures.get('split', '?')}")
    return "; ".join(parts) or "none of this metric"


def document(
    task: Task,
    results: Sequence[SplitResult],
    artifact: Artifact,
    missing: Sequence[str],
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """All that there is to say, as plain values."""
    return {
        "model_config": arguments["model_config"],
        "task": task.name,
        "results": [_split_document(task, result) for result in results],
        "splits_not_in_dataset": list(missing),
        "checkpoint": {"name": artifact.name, "fp32": artifact.fp32_is, "sha256": dict(artifact.hashes)},
        "base_model": artifact.base_model,
        "card": artifact.card.to_dict() if artifact.card else None,
        "max_length": artifact.max_length,
        "quantization": dict(config),
        "arguments": dict(arguments),
        "seed": arguments["seed"],
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _split_document(task: Task, result: SplitResult) -> dict[str, Any]:
    return {
        "data": {**asdict(result.source), "rows": result.fp32.rows, "sha256": result.sha256},
        "fp32": {"metrics": result.fp32.metrics, "seconds": result.fp32.seconds},
        "w8a8": {"metrics": result.w8a8.metrics, "seconds": result.w8a8.seconds},
        "difference": {name: result.w8a8.metrics[name] - value for name, value in result.fp32.metrics.items()},
        "agreement": {"kind": "mean absolute difference" if task.regression else "percent equal", "value": result.agreement(task)},
    }


def versions() -> dict[str, str]:
    libraries = (quantsim, torch, transformers, datasets, np, scipy, sklearn)
    return {"python": platform.python_version(), **{library.__name__: str(library.__version__) for library in libraries}}


def prepare_folder(folder: str) -> Path:
    """Make the output folder before the work, not after it.

    Raises:
        RecipeError: it cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RecipeError(f"--output_dir {folder}: cannot be written to ({error.strerror}); give another folder") from error
    return path


def write(folder: Path, values: Mapping[str, Any]) -> Path:
    """``results.json``, whole or not at all."""
    path = folder / RESULTS
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        file = Path(staging) / RESULTS
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        file.replace(path)
    return path
