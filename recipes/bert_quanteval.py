"""Evaluate a published checkpoint, FP32 against W8A8.

    python recipes/bert_quanteval.py --model_config bert_w8a8_rte

Prints a table and writes ``results.json``. Exit code 0, or 2 with one paragraph that says what to set right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from accelerate import PartialState
from datasets import Dataset
from tabulate import tabulate
from torch import nn
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from model_zoo.cards import find, how_to_train, published
from quantsim import CalibrationError, CheckpointError, ConfigError, LoweringError, OnnxError, QuantConfig, TraceError
from quantsim.config import near
from recipes.artifacts import Artifact, resolve
from recipes.backends import BACKENDS, SIMULATED, on_backend
from recipes.data import DataSource, MissingSplitError, encode, load_rows, rows_sha256
from recipes.devices import usable_device
from recipes.evaluation import Evaluation, evaluate
from recipes.hub import go_offline
from recipes.results import SplitResult, document, notes, prepare_folder, table, write
from recipes.tasks import MODEL_CONFIGS, RecipeError, Task, task_of

Splits = list[tuple[Dataset, DataSource]]


@dataclass
class Arguments:
    """The flags. ``--model_config`` is enough."""

    model_config: str | None = field(default=None, metadata={"help": f"what to evaluate: {', '.join(MODEL_CONFIGS)}"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows a forward sees"})
    output_dir: str = field(default="./evaluation_result", metadata={"help": "where results.json is written"})
    dataset: str | None = field(default=None, metadata={"help": "a folder in the Hub's layout, or a Hub id; by default the task's own"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "only the first so many rows of each split"})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "another checkpoint: a card's name, a folder (a bundle, or of QuantSim.save_pretrained), a Hub id or a URL"},
    )
    base_model: str | None = field(default=None, metadata={"help": "a folder or Hub id to take the card's base model from"})
    offline: bool = field(default=False, metadata={"help": "never ask the Hub"})
    seed: int = field(default=1000, metadata={"help": "written down with the results; the evaluation itself draws nothing"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, mps …"})
    backend: str | None = field(
        default=None, metadata={"help": f"what the W8A8 model runs on: {', '.join(BACKENDS)}; default what its card was measured on"}
    )
    list: bool = field(default=False, metadata={"help": "say what can be evaluated, and stop"})


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    try:
        arguments = parse(argv)
        if arguments.list:
            print(listing())
            return 0
        run(arguments)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError, LoweringError, OnnxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Flags → values, checked as far as they can be without any work.

    Raises:
        RecipeError: an unknown flag, or a number that makes no sense.
    """
    parser = HfArgumentParser(Arguments, description="Evaluate a published checkpoint, FP32 against W8A8.")  # type: ignore[arg-type]
    arguments, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    assert isinstance(arguments, Arguments)
    if rest:
        flags = [f"--{f.name}" for f in fields(Arguments)]
        raise RecipeError(f"no flag {rest[0]!r} (nearest: {near(rest[0], flags, 1)}); --help lists them all")
    for name in ("per_device_eval_batch_size", "max_eval_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name} {value}: expected 1 or more")
    if arguments.backend not in (None, *BACKENDS):
        raise RecipeError(f"--backend {arguments.backend}: expected one of {', '.join(BACKENDS)}")
    if arguments.backend not in (None, SIMULATED) and arguments.device != "cpu":
        raise RecipeError(f"--backend {arguments.backend} runs on the CPU; leave out --device {arguments.device}")
    return arguments


def listing() -> str:
    """Every config: its task and metrics, and whether its checkpoint is published."""
    rows = []
    for name in MODEL_CONFIGS:
        task = task_of(name)
        if name in published():
            card = find(name)
            state = f"published, from {card.base_model['name']}"
        else:
            state = f"not published: {how_to_train(name)}"
        rows.append((name, ", ".join(task.metrics), ", ".join(task.splits), state))
    return tabulate(rows, headers=("model config", "metrics", "splits", "checkpoint"), tablefmt="github")


def run(arguments: Arguments) -> None:
    """Find, check, evaluate twice, report."""
    if arguments.model_config is None:
        raise RecipeError(f"--model_config is missing; give one of {', '.join(MODEL_CONFIGS)} (--list says more)")
    task = task_of(arguments.model_config)
    _quiet()
    if arguments.offline:
        go_offline()
    set_seed(arguments.seed)
    device = usable_device(arguments.device)
    artifact = resolve(arguments.model_config, arguments.checkpoint, task, arguments.base_model)
    folder = prepare_folder(arguments.output_dir)
    splits, missing = _load_splits(task, arguments)
    backend = arguments.backend or (artifact.card.backend if artifact.card else SIMULATED)
    results, config = measure(task, artifact, splits, arguments.per_device_eval_batch_size, device, backend)
    if not PartialState(cpu=device.type == "cpu").is_main_process:
        return
    print(f"\n{arguments.model_config}\n\n{table(task, results)}\n")
    print("\n".join(notes(task, results, artifact, missing)))
    print(f"W8A8 runs: {backend}")
    path = write(folder, document(task, results, artifact, missing, config.to_dict(), asdict(replace(arguments, backend=backend))))
    print(f"written: {path}")


def measure(
    task: Task, artifact: Artifact, splits: Splits, batch_size: int, device: torch.device | str = "cpu", backend: str = SIMULATED
) -> tuple[list[SplitResult], QuantConfig]:
    """Both models on every split, one model after the other; and how the second is quantized."""
    model = artifact.load_float()
    tokenizer = artifact.tokenizer(model.config.vocab_size)
    encoded = [encode(rows, task, tokenizer, artifact.max_length) for rows, _ in splits]

    def evaluate_all(name: str, model: nn.Module) -> list[Evaluation]:
        return [
            evaluate(model, ids, task, rows=rows, batch_size=batch_size, device=device, description=f"{name} {source.split}")
            for ids, (rows, source) in zip(encoded, splits, strict=True)
        ]

    fp32 = evaluate_all("FP32", model)
    sim = artifact.load_simulation()
    w8a8 = evaluate_all("W8A8", on_backend(sim, backend))
    both = zip(splits, fp32, w8a8, strict=True)
    return [SplitResult(source, rows_sha256(task, rows), before, after) for (rows, source), before, after in both], sim.config


def _load_splits(task: Task, arguments: Arguments) -> tuple[Splits, list[str]]:
    """The rows of each of the task's splits, and the splits that the dataset lacks; an error where it lacks them all."""
    found: Splits = []
    missing: dict[str, MissingSplitError] = {}
    for split in task.splits:
        try:
            found.append(load_rows(task, arguments.dataset, split, offline=arguments.offline, max_rows=arguments.max_eval_samples))
        except MissingSplitError as error:
            missing[split] = error
        else:
            if found[-1][1].kind == "sample":
                break  # one sample stands for all splits
    if not found:
        raise next(iter(missing.values()))
    return found, list(missing)


def _quiet() -> None:
    """The only bars are the evaluations', the only words the program's own."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
