"""The program: arguments → a command → its answer, and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from transformers.utils import logging as transformers_logging

import quantsim
from quantsim.cli.command import Command, CommandError
from quantsim.cli.coverage import COVERAGE
from quantsim.cli.evaluate import EVALUATE
from quantsim.cli.export import EXPORT
from quantsim.cli.listing import LIST
from quantsim.cli.lower import LOWER
from quantsim.cli.quantize import QUANTIZE
from quantsim.cli.report import REPORT
from quantsim.config import near

COMMANDS = {command.name: command for command in (QUANTIZE, EVALUATE, REPORT, LOWER, EXPORT, COVERAGE, LIST)}
EXIT_CODES = """\
exit codes:
  0    done
  1    a mistake of the program; --debug shows where
  2    bad usage or bad input; a line on stderr says what was wrong, where, and what to do
  130  interrupted; nothing half-written is left"""
DONE, MISTAKE, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
USERS = (
    CommandError,
    quantsim.CalibrationError,
    quantsim.CheckpointError,
    quantsim.ConfigError,
    quantsim.EncodingsError,
    quantsim.IntegerError,
    quantsim.LoweringError,
    quantsim.OnnxError,
    quantsim.ReportError,
    quantsim.TraceError,
    OSError,
)
LONGEST = 1000  # characters of an error's line


def program() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that what is half-written is removed
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (``EXIT_CODES``).

    With ``--json`` one object goes to stdout: the command's, or ``{"error": …, "kind": …}``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = "--debug" in argv, "--json" in argv
    try:
        command, args = parse(argv)
        with _quiet(debug), redirect_stdout(sys.stderr):
            answer = command.run(args)
        _say(json.dumps({"command": command.name, **answer.values}, ensure_ascii=False, allow_nan=False) if as_json else answer.text)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # of --help and --version
        return int(stop.code or 0)
    except Exception as error:
        return _refuse(error, debug, as_json)
    return DONE


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Words → a command and its arguments.

    Raises:
        CommandError: they mean nothing; the nearest command or flag is named.
    """
    parser, commands = _parsers()
    if not argv:
        raise CommandError(f"no command; the commands are {', '.join(COMMANDS)} (quantsim --help says more)")
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise CommandError(f"no command {argv[0]!r} (nearest: {near(argv[0], COMMANDS, 1)}); the commands are {', '.join(COMMANDS)}")
    args, rest = parser.parse_known_args(argv)
    if rest:
        chosen = commands.get(argv[0], parser)
        flags = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", chosen.format_usage())))
        advice = f" (nearest: {near(rest[0], flags, 1)})" if rest[0].startswith("-") else ""
        raise CommandError(f"{argv[0]}: {rest[0]!r} means nothing here{advice}; quantsim {argv[0]} --help lists its arguments")
    return COMMANDS[args.command], args


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as an error, in place of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog}: {message}; {self.prog} --help says more")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    examples = "\n".join(f"  {command.examples[0]}" for command in COMMANDS.values())
    parser = _Parser(
        prog="quantsim",
        description="Quantize Hugging Face encoders: simulate, evaluate, lower to int8, export.",
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}\n\nquantsim COMMAND --help has more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"quantsim {quantsim.__version__}")
    room = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    return parser, {name: _parser(room, command) for name, command in COMMANDS.items()}


def _parser(room: argparse._SubParsersAction[_Parser], command: Command) -> argparse.ArgumentParser:
    examples = "\n".join(f"  {example}" for example in command.examples)
    parser = room.add_parser(
        command.name,
        help=command.summary,
        description=f"{command.summary}\n\n{command.details}",
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")
    parser.add_argument("--debug", action="store_true", help="every log, and a traceback where something fails")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are, prose filled."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            super(_Help, self)._fill_text(part, width, indent) if "\n" in part else self._prose(part, width) for part in parts
        )

    def _prose(self, text: str, width: int) -> str:
        return argparse.HelpFormatter._fill_text(self, text, width, "")


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Without the logs and bars of other libraries; our own warnings a line each."""
    if debug:
        yield
        return
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"(quantsim|recipes|model_zoo)\b")
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {_line(str(message))}", file=sys.stderr)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _say(text: str) -> None:
    """Print; a reader that went away (``| head``) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: Exception, debug: bool, as_json: bool) -> int:
    """Say what was wrong; 2 where the user can set it right, else 1."""
    from recipes.tasks import RecipeError

    if debug:
        traceback.print_exception(error)
    users = isinstance(error, (*USERS, RecipeError)) or (isinstance(error, ImportError) and "pip install" in str(error))
    message = _line(str(error)) if users else _line(f"a mistake of the program: {type(error).__name__}: {error}; --debug shows where")
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        _say(json.dumps({"error": message, "kind": type(error).__name__}, ensure_ascii=False))
    return REFUSED if users else MISTAKE


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… (--debug shows all of it)"
