"""What a command is, what it answers, and how it says that something was wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from quantsim.config import near

T = TypeVar("T")


class CommandError(ValueError):
    """Something that the user can set right: the message says what was wrong, where, and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a command found: for a reader, and as plain values for ``--json``."""

    text: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """One command of the program.

    Attributes:
        name: the word on the command line.
        summary: what it does, in a line.
        details: what a user has to know besides.
        examples: whole command lines.
        arguments: adds its arguments to a parser.
        run: does the work; raises :class:`CommandError`, or an error of the library.
    """

    name: str
    summary: str
    details: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around an import: what is not installed is an error that names the extra which brings it."""
    try:
        yield
    except ImportError as error:
        lacking = error.name or str(error)
        raise CommandError(f"{lacking} is needed for this and is not installed; pip install 'quantsim[{name}]' brings it") from error


def one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """An argument's type: one of these names, or an error that gives the nearest.

    >>> one_of("estimator", ["min_max", "mse"])("mse")
    'mse'
    """

    def convert(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {what} {text!r} (nearest: {near(text, known, 1)}); there are {', '.join(known)}")
        return text

    return convert


def count(text: str) -> int:
    """An argument's type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1")
    return int(text)


def progress(steps: Iterable[T], title: str, total: int) -> Iterable[T]:
    """``steps`` with a bar on stderr, where that is a terminal."""
    return tqdm(steps, desc=title, total=total, unit="batch", file=sys.stderr, disable=not sys.stderr.isatty())  # type: ignore[no-any-return]
