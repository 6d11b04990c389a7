"""What --data names: a file, a folder, a dataset of the Hub or a GLUE task → rows, and batches of token ids."""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from quantsim.cli.command import CommandError, count, extra
from quantsim.cli.models import HUB_ID
from quantsim.config import near

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from recipes.data import DataSource
    from recipes.tasks import Task

FORMATS = {  # suffix -> what datasets calls it, and how it is told to read it
    ".txt": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
TRAINING, VALIDATION = ("train",), ("validation", "test", "dev")
LABELS = ("label", "labels")
LENGTH = 128  # tokens that rows are padded to, where nothing says otherwise


@dataclass(frozen=True)
class Data:
    """Rows, and which of their columns are text."""

    rows: Dataset
    columns: tuple[str, ...]
    source: DataSource


def data_arguments(parser: argparse.ArgumentParser, *, rows: str, default_rows: int | None) -> None:
    """The arguments that say which rows, and how they become tokens."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DATA", help=f"a file ({', '.join(FORMATS)}), a folder in the Hub's layout, or a Hub id")
    group.add_argument(
        "--task", metavar="TASK", help="a task of GLUE, or squad: says columns, labels and metrics; without --data its own dataset"
    )
    group.add_argument("--subset", metavar="NAME", help="the dataset's configuration, where it has several")
    group.add_argument("--split", metavar="NAME", help=f"default: {rows}")
    group.add_argument("--columns", nargs="+", metavar="NAME", help="one text column, or two for pairs; default: the only one, or 'text'")
    group.add_argument("--rows", type=count, default=default_rows, metavar="N", help=f"how many rows (default {default_rows or 'all'})")
    group.add_argument("--batch", type=count, default=16, metavar="N", help="rows a forward sees (default 16)")
    group.add_argument(
        "--max-length", type=count, metavar="N", help=f"tokens that every row is padded to (default: the task's, or {LENGTH})"
    )
    group.add_argument("--tokenizer", metavar="PLACE", help="a folder or Hub id, where the model has no tokenizer of its own")


def find_data(
    args: argparse.Namespace, task: Task | None, splits: Sequence[str], labels: Sequence[str] = (), usual: Sequence[str] = ()
) -> Data:
    """The rows that the arguments ask for.

    Args:
        args: of :func:`data_arguments`.
        task: what ``--task`` named; checks columns and labels.
        splits: those to look for, the best first.
        labels: columns that are no text.
        usual: the text columns, where neither ``--columns`` nor a task says which and the rows have them.

    Raises:
        CommandError: no rows, no such file, format, split or column.
    """
    with extra("recipes"):
        import datasets

        from recipes.data import DataSource, load_rows
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if args.data is None and task is None:
        raise CommandError("no data: give --data with a file, a folder or a Hub id, or --task with a task of GLUE")
    path = Path(args.data).expanduser() if args.data else None
    is_file = path is not None and (path.is_file() or path.suffix in FORMATS)
    for flag in ("split", "subset"):
        if getattr(args, flag) and (is_file or (task and flag == "subset")):
            what = f"--data {args.data}: is a file" if is_file else f"--task {args.task}: says which subset"
            raise CommandError(f"{what}, so there is no --{flag} {getattr(args, flag)} to choose; leave it out")
    if is_file:
        assert path is not None
        rows, source = _read(path), DataSource(str(path), "dataset", "all rows")
    elif task is not None:
        rows, source = load_rows(task, args.data, args.split or splits[0])
    else:
        rows, source = _load(args.data, args.subset, args.split, splits)
    if not len(rows):
        raise CommandError(f"{source}: no rows")
    found = usual if set(usual) <= set(rows.column_names) else ()
    return Data(rows, _columns(args.columns or (task.columns if task else found), rows, source, labels), source)


def drawn(rows: Dataset, count: int, seed: int) -> Dataset:
    """So many rows, drawn as the recipes draw theirs: the same rows for the same seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows.select(order.tolist())


# ---- rows ----


def _read(path: Path) -> Dataset:
    """The rows of one file, which is not kept in any cache."""
    from datasets import load_dataset

    if path.suffix not in FORMATS:
        raise CommandError(f"--data {path}: its name ends in {path.suffix or 'nothing'}; expected one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise CommandError(f"--data {path}: no such file")
    if not path.stat().st_size:
        raise CommandError(f"--data {path}: is empty; expected rows")
    kind, options = FORMATS[path.suffix]
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options)
        except Exception as error:  # datasets, pandas and pyarrow have a family of them each
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):  # a header alone
                raise CommandError(f"--data {path}: no rows") from error
            raise CommandError(f"--data {path}: cannot be read as {kind} ({type(cause).__name__}: {cause})") from error
        return rows.filter(lambda row: row["text"].strip(), keep_in_memory=True) if kind == "text" else rows


def _load(name: str, subset: str | None, split: str | None, splits: Sequence[str]) -> tuple[Dataset, DataSource]:
    """One split of a folder or a dataset of the Hub."""
    from datasets import load_dataset

    from recipes.data import DataSource
    from recipes.hub import hub_reachable

    is_folder = Path(name).is_dir()
    if not is_folder and not HUB_ID.fullmatch(name):
        raise CommandError(f"--data {name}: no such file or folder, and no Hub id (owner/name) either")
    if not is_folder:
        hub_reachable()  # where nobody answers, datasets then fails within seconds
    try:
        found = load_dataset(name, subset)
    except Exception as error:
        raise CommandError(f"--data {name}: cannot be loaded ({type(error).__name__}: {error})") from error
    wanted = [split] if split else [*splits, *(found if len(found) == 1 else ())]
    chosen = next((s for s in wanted if s in found), None)
    if chosen is None:
        raise CommandError(f"--data {name}: no split {' or '.join(map(repr, wanted))}; choose one by --split: {', '.join(found)}")
    return found[chosen], DataSource(name, "dataset" if is_folder else "hub", chosen)


def _columns(wanted: Sequence[str], rows: Dataset, source: DataSource, labels: Sequence[str]) -> tuple[str, ...]:
    """The text columns: those that are wanted, else the only one, or ``text``."""
    names = rows.column_names
    if wanted:
        for name in wanted:
            if name not in names:
                raise CommandError(f"{source}: no column {name!r} (nearest: {near(name, names, 1)}); it has {', '.join(names)}")
        if len(wanted) > 2:
            raise CommandError(f"--columns {' '.join(wanted)}: expected one, or two for pairs; a tokenizer takes no more")
        return tuple(wanted)
    texts = [name for name in names if name not in labels and is_text(rows[0][name])]
    if len(texts) == 1 or "text" in texts:
        return (texts[0],) if len(texts) == 1 else ("text",)
    raise CommandError(
        f"{source}: which of its columns is the text? Choose one, or two for pairs, by --columns: {', '.join(texts or names)}"
    )


def is_text(value: Any) -> bool:
    """Text, or the words of one."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value))


# ---- tokens ----


def takes_text(name: str, model: nn.Module) -> None:
    """Refuse a model that rows of one or two texts do not fit.

    Raises:
        CommandError: it takes images or sound, or several choices a row.
    """
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise CommandError(
            f"{name}: {type(model).__name__} takes no input_ids, and rows here are text; calibrate it with sim.compute_encodings"
        )
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        raise CommandError(f"{name}: {type(model).__name__} takes several choices a row; calibrate it with sim.compute_encodings")


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that knows more tokens than the model has rows for."""
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if len(tokenizer) > rows:
        raise CommandError(f"{name}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}; give the right one by --tokenizer")


def row_length(args: argparse.Namespace, usual: int | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that rows are padded to: what was asked for, what is usual, or 128, and never more than the model has positions for.

    Raises:
        CommandError: more was asked for.
    """
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
    if args.max_length and args.max_length > most:
        raise CommandError(f"--max-length {args.max_length}: the model takes rows of at most {most} tokens")
    return int(args.max_length or min(usual or LENGTH, most))


def batches(data: Data, tokenizer: PreTrainedTokenizerBase, length: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Token ids ``[rows, length]`` and what the tokenizer gives with them, without labels.

    Raises:
        CommandError: a cell that is no text.
    """
    for start in range(0, len(data.rows), size):
        rows = data.rows[start : start + size]
        for name in data.columns:
            for i, value in enumerate(rows[name]):
                if not is_text(value):
                    raise CommandError(f"{data.source}: row {start + i} of those chosen: {name} is {value!r}; expected text")
        words = isinstance(rows[data.columns[0]][0], list)
        texts = [rows[name] for name in data.columns]
        yield dict(
            tokenizer(*texts, truncation=True, max_length=length, padding="max_length", is_split_into_words=words, return_tensors="pt")
        )
