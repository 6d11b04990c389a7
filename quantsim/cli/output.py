"""Where results are written: checked before the work, whole or not at all after it."""

from __future__ import annotations

import argparse
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantsim.cli.command import CommandError
from quantsim.formats.checkpoint import is_checkpoint


def output_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """``--output`` and ``--overwrite``."""
    parser.add_argument("--output", "-o", required=True, type=Path, metavar="PATH", help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def check_output(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Refuse, before the work, a place that cannot be written to or whose contents would be lost.

    Raises:
        CommandError: it exists (with ``overwrite``: and is neither a file nor a checkpoint of ours), or cannot be made.
    """
    if path.exists() and not (folder and path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise CommandError(f"--output {path}: exists already; give another path, or --overwrite to replace it")
        if folder and not is_checkpoint(path):
            raise CommandError(f"--output {path}: holds no checkpoint of quantsim and is not replaced; give another path")
        if not folder and not path.is_file():
            raise CommandError(f"--output {path}: is a folder; expected the file to write")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise CommandError(f"--output {path}: {above} is no folder that can be written to; give another path")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file or folder to; it takes that name, and its place, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = _beside(path), _beside(path)
    try:
        yield part
        if path.is_dir():
            path.rename(old)  # a folder does not give way to another in one step
        part.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (part, old):
            _remove(left)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
