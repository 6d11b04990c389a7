"""What a card may say. A card comes from anywhere, so every field is checked before it names a file, a URL or a figure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any, get_args

from quantsim import CheckpointError
from quantsim.config import EstimatorName

CARD, FP32, W8A8, CONFIG = "card.json", "fp32.safetensors", "w8a8.safetensors", "config.json"
FILES = (FP32, W8A8, CONFIG)
MEASURED = ("fp32", "ptq", "qat")
BUNDLED, RECIPE_ONLY = "bundled", "recipe only"
HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
URL = re.compile(r"https?://[^\s/?#]+[^\s?#]*", re.ASCII)

_PLAIN = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BASE_MODEL = ("name", "hub_id", "source", "sha256", "revision")


def check_card(path: str, values: Any, fields: Mapping[str, str]) -> None:
    """Refuse what is no card.

    Args:
        path: names the card in messages.
        values: what was read from JSON.
        fields: a card's fields and their annotations.

    Raises:
        CheckpointError: a field that is missing, unknown or of another type; a name that is a path; a place that is none;
            a published card without files or figures, or one that is "recipe only" with them.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is a {type(values).__name__}; expected an object")
    if missing := [name for name in fields if name not in values]:
        raise CheckpointError(f"{path}: no field {', '.join(missing)}")
    if unknown := [name for name in values if name not in fields]:
        raise CheckpointError(f"{path}: unknown field {', '.join(unknown)}; the fields are {', '.join(fields)}")
    for name, kind in fields.items():
        expected = dict if kind.startswith("Mapping") else {"str": str, "int": int}[kind]
        if not isinstance(values[name], expected) or isinstance(values[name], bool):
            raise CheckpointError(f"{path}: {name} is {values[name]!r}; expected {expected.__name__}")
    if not _PLAIN.fullmatch(values["name"]):
        raise CheckpointError(f"{path}: name is {values['name']!r}; expected letters, digits, '_', '-' and '.'")
    _check_base_model(path, values["base_model"])
    _check_where(path, values)
    _check_files(path, values["files"])
    _check_estimators(path, values["estimators"])
    check_sweep(f"{path}: sweep", values["sweep"])


def _check_base_model(path: str, values: Mapping[str, Any]) -> None:
    if missing := [part for part in _BASE_MODEL if part not in values]:
        raise CheckpointError(f"{path}: base_model has no {', '.join(missing)}")
    for part, value in values.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: base_model.{part} is {value!r}; expected text (empty where it is not known)")


def _check_where(path: str, values: Mapping[str, Any]) -> None:
    where = values["where"]
    if where not in (BUNDLED, RECIPE_ONLY) and not HUB.fullmatch(where) and not URL.fullmatch(where):
        raise CheckpointError(
            f"{path}: where is {where!r}; expected {BUNDLED!r}, {RECIPE_ONLY!r}, 'hub:owner/name@revision' or the URL of a folder"
        )
    if where == RECIPE_ONLY:
        if given := [name for name in ("files", "metrics", "estimators", "sweep", "date") if values[name]]:
            raise CheckpointError(f"{path}: where is {RECIPE_ONLY!r}; expected no {', '.join(given)}")
        return
    if missing := [part for part in MEASURED if part not in values["metrics"]]:
        raise CheckpointError(f"{path}: metrics has no {', '.join(missing)}")
    _check_mappings(path, "metrics", values["metrics"])
    if missing := [name for name in FILES if name not in values["files"]]:
        raise CheckpointError(f"{path}: files has no {', '.join(missing)}")


def _check_files(path: str, files: Mapping[str, Any]) -> None:
    for name, record in files.items():
        if not _PLAIN.fullmatch(name) or name == CARD or not _is_record(record):
            raise CheckpointError(f"{path}: files.{name} is {record!r}; expected a plain file name with size and sha256")


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or set(record) != {"size", "sha256"}:
        return False
    size, sha256 = record["size"], record["sha256"]
    return type(size) is int and size > 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None


def _check_estimators(path: str, values: Mapping[str, Any]) -> None:
    if unknown := [name for name in values if name not in get_args(EstimatorName)]:
        raise CheckpointError(f"{path}: estimators.{unknown[0]}: no range estimator; they are {', '.join(get_args(EstimatorName))}")
    _check_mappings(path, "estimators", values)


def _check_mappings(path: str, name: str, values: Mapping[str, Any]) -> None:
    for part, figures in values.items():
        if not isinstance(figures, dict):
            raise CheckpointError(f"{path}: {name}.{part} is {figures!r}; expected dict")


def check_sweep(where: str, sweep: Any) -> None:
    """Refuse a sweep over seeds whose summary is not that of its values; an empty one is none.

    A seed may be there again: on another CPU, or with other threads, sums in bf16 have another order, and training ends elsewhere.

    >>> part = {"values": [61.0, 60.0, 65.0], "median": 61.0, "least": 60.0, "greatest": 65.0}
    >>> check_sweep("sweep.json", {"seeds": [1, 2, 3], "fp32": part, "ptq": part, "qat": part})

    Raises:
        CheckpointError: other fields, a seed without a value, a median, least or greatest value that is another.
    """
    if sweep == {}:
        return
    if not isinstance(sweep, dict) or set(sweep) != {"seeds", *MEASURED}:
        raise CheckpointError(f"{where}: expected an object with seeds, {', '.join(MEASURED)}")
    seeds = sweep["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise CheckpointError(f"{where}.seeds is {seeds!r}; expected whole numbers")
    for name in MEASURED:
        _check_summary(f"{where}.{name}", sweep[name], len(seeds))


def _check_summary(where: str, part: Any, seeds: int) -> None:
    if not isinstance(part, dict) or set(part) != {"values", "median", "least", "greatest"}:
        raise CheckpointError(f"{where}: expected an object with values, median, least, greatest")
    values = part["values"]
    if not isinstance(values, list) or len(values) != seeds or not all(_is_number(value) for value in values):
        raise CheckpointError(f"{where}.values is {values!r}; expected a number a seed, {seeds} of them")
    for name, found in (("median", statistics.median(values)), ("least", min(values)), ("greatest", max(values))):
        if not _is_number(part[name]) or abs(part[name] - found) > 0.005:  # figures are read at two decimals
            raise CheckpointError(f"{where}.{name} is {part[name]!r}; its values give {found}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
