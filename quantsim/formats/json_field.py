"""A value out of a JSON file together with where it stands, so that every refusal names file, field, value and expectation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 80


@dataclass(frozen=True)
class JsonField:
    """One value of a file. Each check gives the value as the type it asks for, or refuses it with ``error``.

    >>> JsonField(Path("a.json"), "scale", -1.0, ValueError).number(above=0)
    Traceback (most recent call last):
    ...
    ValueError: a.json: scale is -1.0; expected a finite number above 0
    """

    path: Path
    name: str
    value: Any
    error: type[Exception]

    def refuse(self, expected: str) -> Exception:
        seen = repr(self.value)
        seen = seen if len(seen) <= SHOWN else f"{seen[:SHOWN]}…"
        return self.error(f"{self.path}: {self.name or 'the file'} is {seen}; expected {expected}")

    def _inside(self, key: object, value: Any) -> JsonField:
        return JsonField(self.path, f"{self.name}.{key}" if self.name else str(key), value, self.error)

    def get(self, key: str, default: Any = None) -> JsonField:
        """A field of an object; ``default`` where it is absent."""
        return self._inside(key, self.value.get(key, default))

    def items(self) -> Iterator[tuple[str, JsonField]]:
        """The fields of an object."""
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        yield from ((key, self._inside(key, value)) for key, value in self.value.items())

    def elements(self) -> list[JsonField]:
        """The values of a list that holds at least one."""
        if not isinstance(self.value, list) or not self.value:
            raise self.refuse("a list with at least one value")
        return [self._inside(i, value) for i, value in enumerate(self.value)]

    def only(self, required: Sequence[str], optional: Sequence[str] = ()) -> JsonField:
        """Itself, an object with all of ``required`` and nothing beyond ``optional``."""
        keys = {key for key, _ in self.items()}
        if missing := [key for key in required if key not in keys]:
            raise self.refuse(f"an object with {', '.join(required)}; missing {', '.join(missing)}")
        if unknown := sorted(keys - {*required, *optional}):
            raise self.get(unknown[0]).refuse(f"no such field; those read here are {', '.join((*required, *optional))}")
        return self

    def number(self, above: float = -math.inf) -> float:
        """A finite number."""
        expected = "a finite number" + (f" above {above:g}" if above > -math.inf else "")
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.refuse(expected)
        try:
            number = float(self.value)
        except OverflowError:
            raise self.refuse(expected) from None
        if not math.isfinite(number) or number <= above:
            raise self.refuse(expected)
        return number

    def whole(self, lowest: int, highest: int) -> int:
        """An integer from ``lowest`` to ``highest``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not lowest <= self.value <= highest:
            raise self.refuse(f"an integer from {lowest} to {highest}" if lowest < highest else str(lowest))
        return self.value

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.refuse("text")
        return self.value

    def one_of(self, *values: object) -> Any:
        """One of these values, of the same type."""
        if not any(type(self.value) is type(value) and self.value == value for value in values):
            raise self.refuse(" or ".join(json.dumps(value) for value in values))
        return self.value


def read_json(path: Path, error: type[Exception]) -> JsonField:
    """A file's JSON. Refused beside what is no JSON: a key that is there twice, ``NaN`` and ``Infinity``, and endless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
        return values

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number; expected finite numbers alone")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not readable as JSON ({problem})") from problem
    return JsonField(path, "", value, error)
