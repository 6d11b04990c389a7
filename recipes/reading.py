"""YAML and flags → a :class:`recipes.recipe.Recipe`, every value checked against its field."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from quantsim.config import near
from recipes.recipe import Recipe
from recipes.tasks import RecipeError

EXTENDS = "extends"


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: the file. ``extends: other.yaml`` in it takes that file's fields (its path seen from this one's folder), and
            changes those that it names itself. Of several files, ``[one.yaml, other.yaml]``, later ones win.
        overrides: dotted field → its value as YAML, as flags give them: ``{"qat.lr": "1e-5", "intermediate.0.epochs": "1"}``.

    Raises:
        RecipeError: no such file or field (the nearest is named), a value of the wrong kind, a field that is missing.
    """
    values = _load(Path(path))
    for name, text in (overrides or {}).items() if values else ():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--{name} {text}: no YAML ({str(error).splitlines()[0]}); put it in quotation marks") from error
        _set(values, name, value)
    try:
        return build(Recipe, values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _load(path: Path, above: tuple[Path, ...] = ()) -> Any:
    if path.resolve() in above:
        raise RecipeError(f"{path}: {EXTENDS} leads back to this file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(values, dict) or EXTENDS not in values:
        return values
    extended = values.pop(EXTENDS)
    for name in reversed(extended if isinstance(extended, list) else [extended]):
        values = _merged(_load(path.parent / str(name), (*above, path.resolve())), values)
    return values


def _merged(base: Any, changes: Any) -> Any:
    """``changes`` over ``base``: field by field where both have fields, else in its place."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {name: _merged(base.get(name), value) for name, value in changes.items()}


def _set(values: Any, name: str, value: Any) -> None:
    """``values["a"]["b"] = value`` for the name ``a.b``; a number is a place in a list."""
    *way, last = name.split(".")
    for depth, part in enumerate([*way, last]):
        if isinstance(values, list) and not (part.isdigit() and int(part) < len(values)):
            raise RecipeError(f"--{name}: {'.'.join(way[:depth])} has the places 0 to {len(values) - 1}, not {part!r}")
        key = int(part) if isinstance(values, list) else part
        if depth == len(way):
            values[key] = value
            return
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[key]
        if not isinstance(values, (dict, list)):
            raise RecipeError(f"--{name}: {'.'.join(way[: depth + 1])} is {values!r} and has no fields")


T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from plain values, every one checked against its field.

    >>> build(Distillation, {"weight": "5e-1"})
    Distillation(weight=0.5, temperature=2.0)
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'recipe'}: {values!r}; expected the fields {', '.join(f.name for f in fields(cls))}")
    known = {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in known:
            raise RecipeError(
                f"{prefix}{name}: no such field; nearest: {prefix}{near(str(name), known, 1)}. The fields are {', '.join(known)}"
            )
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"{prefix}{name}: missing")
    hints = get_type_hints(cls)
    given = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return cls(**given)
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(next(o for o in options if o is not types.NoneType), value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in options else value  # YAML reads a bare no as false
        if value not in options:
            raise RecipeError(f"{where}: {value!r}; expected one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence | None) or isinstance(value, str):
            raise RecipeError(f"{where}: {value!r}; expected a list")
        return tuple(_convert(options[0], x, f"{where}.{i}") for i, x in enumerate(value or ()))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {value!r}; expected pairs as {{0: 0, 1: 1}}")
        return {_convert(options[0], k, where): _convert(options[1], x, where) for k, x in value.items()}
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    try:
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    except ValueError:
        pass
    raise RecipeError(f"{where}: {value!r}; expected {'text' if kind is str else f'a value of type {kind.__name__}'}")
