"""CSV files of measured figures: a line a run, and the whole file or none of it is written."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from model_zoo.results import csv_text
from recipes.tasks import RecipeError

Row = dict[str, str]


def read_lines(path: Path, fields: Sequence[str]) -> list[Row]:
    """The lines of a file; none where there is no file.

    Raises:
        RecipeError: it has other columns.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != list(fields):
        raise RecipeError(f"{path}: columns {', '.join(rows[0])}; expected {', '.join(fields)}. Move it away to begin anew")
    return rows


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While it lasts no other process that asks is in here: to read a file, add a line and write it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_lines(path: Path, rows: Sequence[Row], fields: Sequence[str]) -> None:
    """Replace the file; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".saving-{os.getpid()}")
    staging.write_text(csv_text(rows, fields), encoding="utf-8")
    staging.replace(path)
