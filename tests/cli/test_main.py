"""The program itself: help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import quantsim
from quantsim.cli import main as module
from quantsim.cli.main import COMMANDS, EXIT_CODES, main, parse
from tests.cli.conftest import Run

ROOT = Path(quantsim.__file__).parents[1]


def program(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "quantsim", *argv], capture_output=True, text=True, check=False, cwd=ROOT)


def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`quantsim list` fails with an error."""

    def fail(_: object) -> Any:
        raise error

    monkeypatch.setitem(module.COMMANDS, "list", dataclasses.replace(COMMANDS["list"], run=fail))


# ---- help ----


def test_the_help_names_every_command_and_exit_code(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(f"\n    {name}" in ran.out for name in COMMANDS)
    assert EXIT_CODES in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_its_examples(name: str, run: Run) -> None:
    ran = run(name, "--help")
    assert ran.code == 0
    assert EXIT_CODES in ran.out
    assert COMMANDS[name].examples
    assert all(f"\n  {example}\n" in ran.out for example in COMMANDS[name].examples)


@pytest.mark.parametrize("example", [example for command in COMMANDS.values() for example in command.examples])
def test_examples_are_understood(example: str) -> None:
    program, *words = shlex.split(example)
    assert program == "quantsim"
    command, args = parse(words)
    assert command.name == args.command == words[0]


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"quantsim {quantsim.__version__}\n"


# ---- bad usage ----


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "no command; the commands are quantize"),
        (("quantise", "x"), "no command 'quantise' (nearest: quantize)"),
        (("list", "--jsno"), "'--jsno' means nothing here (nearest: --json)"),
        (("quantize", "x", "--output", "y", "--estimater", "mse"), "(nearest: --estimator)"),
        (("list", "everything"), "'everything' means nothing here"),
        (("quantize", "x"), "required: --output"),
        (("quantize", "x", "--output", "y", "--rows", "0"), "argument --rows: '0'; expected a whole number from 1"),
        (("quantize", "x", "--output", "y", "--estimator", "minmax"), "no estimator 'minmax' (nearest: min_max)"),
        (("export", "x", "--output", "y", "--format", "tflite"), "no format 'tflite'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_understood(argv: tuple[str, ...], message: str, run: Run) -> None:
    assert message in run(*argv).refused()


# ---- exit codes ----


def test_a_refusal_is_json_too(run: Run) -> None:
    ran = run("lower", "/no/where", "--output", "x", "--json")
    assert ran.code == 2
    assert ran.json["kind"] == "CommandError"
    assert ran.err == f"error: {ran.json['error']}\n"


def test_a_mistake_of_the_program_is_1_and_no_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    broken(monkeypatch, KeyError("lost"))
    ran = run("list")
    assert ran.code == 1
    assert ran.err == "error: a mistake of the program: KeyError: 'lost'; --debug shows where\n"


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    broken(monkeypatch, KeyError("lost"))
    ran = run("list", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_a_message_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    broken(monkeypatch, quantsim.TraceError("a\nb\n" + "c" * 5000))
    message = run("list").refused()
    assert message.startswith("error: a b ccc")
    assert "--debug" in message


def test_an_interruption(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    broken(monkeypatch, KeyboardInterrupt())
    assert run("list").code == 130


# ---- as a program ----


def test_json_is_alone_on_stdout() -> None:
    done = program("list", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "list"
    assert done.stdout.count("\n") == 1


def test_bad_usage_is_2_and_says_so_on_stderr() -> None:
    done = program("quantise", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "quantsim", "list"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_script_is_the_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    where, name = scripts["quantsim"].split(":")
    assert getattr(import_module(where), name) is module.program


def test_the_console_script_leaves_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantsim", "--version"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            module.program()
        assert stop.value.code == 0
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_logs_of_other_libraries_are_as_they_were() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    main(["list"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
