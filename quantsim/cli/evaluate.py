"""``quantsim evaluate``: how good a model or a checkpoint is on some rows, alone or against another."""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn

from quantsim.cli.command import Answer, Command, CommandError, progress
from quantsim.cli.data import LABELS, VALIDATION, Data, batches, check_vocabulary, data_arguments, find_data, row_length, takes_text
from quantsim.cli.fidelity import nearness
from quantsim.cli.models import Source, find_source
from quantsim.cli.scoring import ANSWERS, QUESTION_COLUMNS, asks, label_column, own_task, with_class_numbers
from quantsim.config import near

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes.evaluation import Evaluation
    from recipes.tasks import Task

FLOAT, SIMULATED = "float", "simulated"


@dataclass(frozen=True)
class Contestant:
    """A model that is evaluated.

    Attributes:
        name: what the user called it.
        backend: ``"float"``, or what runs the quantized model.
        head: an instance of the model's class, whatever runs it.
        model: takes and gives what that does.
    """

    name: str
    backend: str
    head: PreTrainedModel
    model: nn.Module


def run(args: argparse.Namespace) -> Answer:
    from recipes.devices import usable_device

    device = usable_device(args.device)
    source = find_source(args.model)
    contestants = [_contestant(source, args.backend, device)]
    against = args.against or (FLOAT if args.unlabelled else None)
    if against is not None:
        contestants.append(_other(source, contestants[0], against))
    head = contestants[0].head
    takes_text(source.name, head)
    tokenizer = source.usual_tokenizer(args.tokenizer)
    for contestant in contestants:
        check_vocabulary(contestant.name, tokenizer, contestant.head)
    task = _task(args)
    if args.unlabelled:
        return _compare(contestants, _rows(args, task, head), tokenizer, source, args, device)
    return _score(contestants, _rows(args, task, head), task, tokenizer, source, args, device)


# ---- what is evaluated ----


def _contestant(source: Source, backend: str, device: torch.device) -> Contestant:
    from recipes.backends import BACKENDS, on_backend

    if backend not in BACKENDS:
        raise CommandError(f"--backend {backend}: no such backend (nearest: {near(backend, BACKENDS, 1)}); there are {', '.join(BACKENDS)}")
    if backend != SIMULATED and device.type != "cpu":
        raise CommandError(f"--backend {backend}: runs on the CPU; leave out --device {device}")
    if source.load_simulation is None:
        if backend != SIMULATED:
            raise CommandError(f"--backend {backend}: {source.name} is not quantized; leave it out, or quantize it by `quantsim quantize`")
        return _in_float(source.name, source, device)
    sim = source.simulation()
    sim.freeze_ranges()  # learned or not, they are what they are
    nn.Module.to(sim.model, device)
    return Contestant(source.name, backend, sim.model, on_backend(sim, backend))  # type: ignore[arg-type]  # of the source's class


def _in_float(name: str, source: Source, device: torch.device) -> Contestant:
    model = source.load_float()
    return Contestant(name, FLOAT, model, nn.Module.to(model, device))


def _other(source: Source, first: Contestant, against: str) -> Contestant:
    """The second contestant: the first one's floating-point side, or another model."""
    device = first.head.device
    if against == FLOAT:
        if source.load_simulation is None:
            raise CommandError(f"--against {FLOAT}: {source.name} is not quantized, so it is compared with itself; name another model")
        return _in_float(f"{source.name}, {FLOAT}", source, device)
    other = _contestant(find_source(against), SIMULATED, device)
    if type(other.head) is not type(first.head):
        raise CommandError(f"--against {against}: is a {type(other.head).__name__}, and {first.name} a {type(first.head).__name__}")
    return other


def _task(args: argparse.Namespace) -> Task | None:
    """What ``--task`` names, on the columns that are named."""
    from recipes.tasks import find_task

    if not args.task:
        return None
    task = find_task(args.task)
    return replace(task, columns=tuple(args.columns or task.columns), label=args.label or task.label)


def _rows(args: argparse.Namespace, task: Task | None, head: PreTrainedModel) -> Data:
    splits = task.splits if task else VALIDATION
    usual = QUESTION_COLUMNS if asks(head) else ()
    data = find_data(args, task, splits, (args.label,) if args.label else LABELS, usual)
    rows = data.rows.select(range(min(args.rows, len(data.rows)))) if args.rows else data.rows
    return Data(rows, data.columns, data.source)


# ---- with labels ----


def _score(
    contestants: list[Contestant],
    data: Data,
    task: Task | None,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    args: argparse.Namespace,
    device: torch.device,
) -> Answer:
    from recipes.data import check_rows, encode, rows_sha256
    from recipes.evaluation import evaluate

    head = contestants[0].head
    if task is None:
        label = ANSWERS if asks(head) and not args.label else label_column(args.label, data)
        task = own_task(head, data.columns, label)
    rows = data.rows if task.span else with_class_numbers(data.rows, task.label, head.config, data.source)
    check_rows(task, rows, data.source)
    length = row_length(args, source.max_length or task.max_length, head.config, tokenizer)
    encoded = encode(rows, task, tokenizer, length)
    results = [
        evaluate(c.model, encoded, task, rows=rows, batch_size=args.batch, device=device, description=c.name, progress=sys.stderr.isatty())
        for c in contestants
    ]
    values = _values(contestants, data, length) | {"task": task.name, "kind": task.kind, "rows_sha256": rows_sha256(task, rows)}
    for found, result in zip(values["models"], results, strict=True):
        found |= {"metrics": result.metrics, "seconds": round(result.seconds, 3)}
    if len(results) == 2:
        values |= _difference(task, *results)
    return Answer(_table(values, task.metrics), values)


def _difference(task: Task, first: Evaluation, second: Evaluation) -> dict[str, Any]:
    from recipes.metrics import agreement

    kind = "mean absolute difference" if task.regression else "percent equal"
    return {
        "difference": {name: value - second.metrics[name] for name, value in first.metrics.items()},
        "agreement": {"kind": kind, "value": agreement(task, first.predictions, second.predictions)},
    }


def _table(values: dict[str, Any], metrics: tuple[str, ...]) -> str:
    models = values["models"]
    headers = ["metric", *(f"{model['name']} ({model['runs']})" for model in models), *(["difference"] if len(models) == 2 else [])]
    rows = []
    for name in metrics:
        figures = [f"{model['metrics'][name]:.2f}" for model in models]
        rows.append([name, *figures, *([f"{values['difference'][name]:+.2f}"] if len(models) == 2 else [])])
    rows.append(["seconds", *(f"{model['seconds']:.1f}" for model in models), *([""] if len(models) == 2 else [])])
    lines = [_table_of(rows, headers), "", _said(values)]
    if "agreement" in values:
        lines.append(f"predictions: {values['agreement']['kind']} {values['agreement']['value']:.4g}")
    return "\n".join(lines)


# ---- without ----


def _compare(
    contestants: list[Contestant],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    args: argparse.Namespace,
    device: torch.device,
) -> Answer:
    first, reference = contestants
    length = row_length(args, source.max_length, first.head.config, tokenizer)
    takes = inspect.signature(type(first.head).forward).parameters
    steps = progress(batches(data, tokenizer, length, args.batch), "compare", -(-len(data.rows) // args.batch))
    found = nearness(reference.model.eval(), first.model.eval(), steps, takes, device)
    outputs = {name: {"sqnr_db": near.sqnr, "agreement_percent": near.agreement} for name, near in found.items()}
    values = _values(contestants, data, length) | {"outputs": outputs}
    rows = [(name, _figure(near.sqnr, "equal"), _figure(near.agreement, "")) for name, near in found.items()]
    headers = ("output", "SQNR, dB", "decisions that agree, %")
    return Answer(f"{_table_of(rows, headers)}\n\n{first.name} ({first.backend}) against {reference.name}\n{_said(values)}", values)


def _figure(value: float | None, none: str) -> str:
    return none if value is None else f"{value:.2f}"


def _table_of(rows: Any, headers: Any) -> str:
    right = ("left",) + ("right",) * (len(headers) - 1)
    return tabulate(rows, headers=headers, tablefmt="github", colalign=right, disable_numparse=True)


def _values(contestants: list[Contestant], data: Data, length: int) -> dict[str, Any]:
    return {
        "models": [{"name": c.name, "runs": c.backend, "architecture": type(c.head).__name__} for c in contestants],
        "data": asdict(data.source) | {"columns": list(data.columns), "rows": len(data.rows), "max_length": length},
    }


def _said(values: dict[str, Any]) -> str:
    data = values["data"]
    note = f" ({data['note']})" if data["note"] else ""
    return f"{data['rows']} rows of {data['name']}, {data['split']}{note}; padded to {data['max_length']} tokens"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, a folder or Hub id of a transformers model, or a card of the zoo")
    parser.add_argument(
        "--against", metavar="MODEL", help=f"another model on the same rows; '{FLOAT}' is the checkpoint's own floating-point side"
    )
    parser.add_argument("--unlabelled", action="store_true", help=f"compare outputs, any head, no labels (against '{FLOAT}' by default)")
    parser.add_argument(
        "--backend", default=SIMULATED, metavar="NAME", help="what runs a checkpoint: see `quantsim list` (default simulated)"
    )
    data_arguments(parser, rows="validation, test, or the only one", default_rows=None)
    parser.add_argument("--label", metavar="NAME", help="the column with the answers (default label, labels; of questions answers)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps … (default cpu)")


EVALUATE = Command(
    name="evaluate",
    summary="Score a model or a checkpoint on labelled rows, or compare its outputs with another's.",
    details=(
        "The model's own head decides what is scored: classes by accuracy (of two also F1 and Matthews), one label by correlation, "
        "questions by F1 and exact match, in percent; --task scores as GLUE or SQuAD do. Rows are padded to one length, because with a "
        "clamped mask a quantized model sees the padding. Any other head: --unlabelled."
    ),
    examples=(
        "quantsim evaluate bert-w8a8 --data test.csv --columns sentence --label label --against float",
        "quantsim evaluate bert_w8a8_rte --task rte --data nyu-mll/glue --backend int8",
        "quantsim evaluate ./my-model --data reviews.parquet --json",
        "quantsim evaluate bert-w8a8 --unlabelled --data sentences.txt --backend onnxruntime",
    ),
    arguments=arguments,
    run=run,
)
