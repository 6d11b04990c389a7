"""Imports run downwards only: hf, ibert → sim → lowered, … → report → rewrites, formats → quantizers → graph, kernels → the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantsim

PACKAGE = Path(quantsim.__file__).parent
LEVELS = {
    "config": 0,
    "numerics": 1,
    "graph": 2,
    "kernels": 2,
    "quantizers": 3,
    "rewrites": 4,
    "formats": 4,
    "report": 5,
    "lowered": 6,
    "post_training": 6,
    "integer_training": 6,
    "sim": 7,
    "hf": 8,
    "ibert": 8,
    "__init__": 9,
}
PROGRAMS = {"cli": 98, "__main__": 99}  # above all; they use what is installed beside the library too: recipes and model_zoo
LEVELS |= PROGRAMS
FILES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in FILES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in PROGRAMS]


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Every ``quantsim.…`` module that the file names in an import, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room"
            yield node.module or ""


def rooms_used(path: Path) -> set[str]:
    modules = (name.split(".") for name in imported_modules(path))
    return {parts[1] if len(parts) > 1 else "__init__" for parts in modules if parts[0] == "quantsim"}


def test_every_room_has_a_level() -> None:
    assert {room_of(path.relative_to(PACKAGE).parts) for path in FILES} == set(LEVELS)


def test_the_parser_sees_imports() -> None:
    used = set[str]().union(*map(rooms_used, (PACKAGE / "sim").glob("*.py")))
    assert {"config", "graph", "quantizers", "rewrites", "formats", "report"} <= used


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_below_alone(path: Path) -> None:
    room = room_of(path.relative_to(PACKAGE).parts)
    upwards = {other for other in rooms_used(path) if other != room and LEVELS[other] >= LEVELS[room]}
    assert not upwards, f"{room} imports {upwards}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_does_not_import_its_programs(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert not tops & {"recipes", "model_zoo", "benchmarks", "tests"}


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    heavy = ("recipes", "model_zoo", "datasets", "sklearn", "accelerate", "transformers.modeling_utils")
    code = f"import sys, quantsim.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
