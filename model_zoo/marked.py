"""Tables that are made by a command and stand in documents between two marks."""

from __future__ import annotations


def in_marks(text: str, name: str, made: str) -> str:
    """``text`` with what stands between ``<!-- name -->`` and ``<!-- /name -->`` made anew.

    >>> in_marks("a <!-- t --> old <!-- /t --> b", "t", "new")
    'a <!-- t -->\\n\\nnew\\n\\n<!-- /t --> b'
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(first)
    _, ends, after = rest.partition(last)
    if not (found and ends):
        raise ValueError(f"no {first} … {last} in the text")
    return f"{before}{first}\n\n{made}\n\n{last}{after}"
