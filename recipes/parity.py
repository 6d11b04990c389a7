"""Compare a published checkpoint's simulation with its int8 kernels, edge by edge, on a task's rows.

    python recipes/parity.py --model_config bert_w8a8_rte --dataset FOLDER

Prints a line an edge. Exit code 0 where no requantized value is off by more than a step, 1 where one is, 2 with one paragraph
that says what to set right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from quantsim import CalibrationError, CheckpointError, ConfigError, LoweringError, Parity, TraceError, compare_lowered, lower_int8
from recipes.artifacts import resolve
from recipes.data import encode, load_rows
from recipes.tasks import MODEL_CONFIGS, RecipeError, task_of


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("parity.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--model_config", required=True, help=f"one of {', '.join(MODEL_CONFIGS)}")
    parser.add_argument("--dataset", help="a folder in the Hub's layout, or a Hub id; by default the task's own")
    parser.add_argument("--checkpoint", help="another checkpoint: a card's name, a folder, a Hub id or a URL")
    parser.add_argument("--max_eval_samples", type=int, help="only the first so many rows")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="rows a forward sees")
    args = parser.parse_args(arguments)
    try:
        parity = compare(args.model_config, args.dataset, args.checkpoint, args.max_eval_samples, args.per_device_eval_batch_size)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError, LoweringError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(parity)
    return 0 if parity.holds else 1


def compare(model_config: str, dataset: str | None, checkpoint: str | None, max_rows: int | None, batch_size: int) -> Parity:
    """The parity of a checkpoint on the first split of its task."""
    task = task_of(model_config)
    artifact = resolve(model_config, checkpoint, task, None)
    rows, source = load_rows(task, dataset, task.splits[0], max_rows=max_rows)
    sim = artifact.load_simulation()
    model: Any = sim.model
    encoded = encode(rows, task, artifact.tokenizer(model.config.vocab_size), artifact.max_length)
    inputs = [str(node.target) for node in sim.graph.graph.find_nodes(op="placeholder")]
    tensors = encoded.select_columns([name for name in inputs if name in encoded.column_names]).with_format("torch")

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(tensors), batch_size):
            yield tensors[start : start + batch_size]

    print(f"{model_config} on {source}")
    in_float32 = lower_int8(sim.graph, sim.placements, packs=False)
    return compare_lowered(sim.graph, sim.lower().graph, batches(), in_float32)


if __name__ == "__main__":
    sys.exit(main())
