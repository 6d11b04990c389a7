"""The table of families: a row each, from the checks; as CSV, and as the page that docs/ shows."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tabulate import tabulate

from tests.families.check import Case, Found, cases, check
from tests.families.configs import FAMILIES, Family

DOCS = Path(__file__).parents[2] / "docs"
ROWS, MARKDOWN = DOCS / "families.csv", DOCS / "families.md"


@dataclass(frozen=True)
class Row:
    """A family.

    Attributes:
        green: heads that passed every check, of those that transformers has.
        classes: model classes that passed, and how many there are: a head may have two.
        activations, weights, mask, excused: of ``shown``, the first class that passed.
        note: what is to be known, or why a class is not green.
    """

    family: str
    model_type: str
    named: str
    classes: str
    green: str
    shown: str
    activations: str
    weights: str
    mask: str
    excused: str
    note: str


def row_of(family: Family) -> Row:
    """Check every class of the family."""
    found: dict[Case, Found] = {}
    refused: dict[Case, str] = {}
    for case in cases(family):
        try:
            found[case] = check(case)
        except Exception as error:
            refused[case] = reason(case, error)
    return make_row(family, found, refused)


def make_row(family: Family, found: dict[Case, Found], refused: dict[Case, str]) -> Row:
    shown = next(iter(found), None)
    notes = ["traced as it evaluates"] if any(f.in_evaluation for f in found.values()) else []
    by_reason: dict[str, list[str]] = {}
    for case, why in refused.items():
        by_reason.setdefault(why, []).append(case.architecture)
    notes += [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
    return Row(
        family.name,
        family.model_type,
        "yes" if family.named else "no",
        f"{len(found)}/{len(found) + len(refused)}",
        ", ".join(dict.fromkeys(case.head for case in found)) or "none",
        shown.architecture if shown else "",
        *(
            (str(found[shown].activations), str(found[shown].weights), found[shown].mask, excused(found[shown]))
            if shown
            else ("", "", "", "")
        ),
        "; ".join(notes),
    )


def excused(found: Found) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in sorted(found.excused.items()))


def reason(case: Case, error: Exception) -> str:
    """The error's first line without the class and its inputs, short enough for a table."""
    line = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
    line = re.sub(r" (with|on) inputs (\[.*?\]|\{.*?\})", "", line.removeprefix(f"{case.architecture}: "))
    return line if len(line) <= 240 else line[:237] + "…"


def read_rows() -> dict[str, Row]:
    """The table that is checked in, by family."""
    if not ROWS.exists():
        return {}
    with ROWS.open(newline="") as file:
        return {values["family"]: Row(**values) for values in csv.DictReader(file)}


def write(rows: Mapping[str, Row]) -> None:
    """Both files, in the order of ``FAMILIES``; a family that is no more has no row."""
    ordered = [rows[family.name] for family in FAMILIES if family.name in rows]
    DOCS.mkdir(exist_ok=True)
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in ordered)
    MARKDOWN.write_text(to_markdown(ordered))


INTRODUCTION = """# Families

Written by `python -m tests.families`: every family of `tests/families/configs.py` with every class that transformers has for the
heads sequence, token and image classification, question answering, masked LM, multiple choice and feature extraction, on a random
model of two narrow layers, preset `aimet`. A class is green when its trace is the model bit for bit, every edge that computes has a
quantizer or a reason to have none, every learned matrix one weight quantizer wherever it is used, every attention's mask is clamped,
calibration, a training step and save and load work, and all quantizers off is the model again, bit for bit. Nothing in the library
knows a family by name. Counts are those of the first green class.

The column "mask" says how it is written: a large number added to hidden scores or filled in for them, or a mask of constants. A window
of attention and a causal order are masks too, and at −6 what they hide keeps e⁻⁶ of its weight. That adds up: where a window hides
hundreds of tokens, give a lower number (`replace(QuantConfig.preset("aimet"), mask_clamp=-12.0)`).

"Traced as it evaluates": the training forward of the model cannot be traced. Its dropout layers stay live; stochastic depth, running
statistics and other things of training alone are left out, and a warning says so.
"""


def to_markdown(rows: Iterable[Row]) -> str:
    rows = list(rows)
    parts = [INTRODUCTION]
    for title, named in (("Built for", "yes"), ("Tried when it was built", "no")):
        table = [
            (r.family, r.classes, r.green, r.shown, r.activations, r.weights, r.mask, r.note.replace("|", "\\|"))
            for r in rows
            if r.named == named
        ]
        headers = ("family", "classes", "heads that are green", "counts of", "activation quantizers", "weight quantizers", "mask", "notes")
        if table:
            parts.append(f"## {title}\n\n{tabulate(table, headers=headers, tablefmt='github', disable_numparse=True)}\n")
    reasons = sorted({part.split(" ", 1)[1] for r in rows for part in r.excused.split("; ") if " " in part})
    if reasons:
        parts.append("## Edges without a quantizer\n\n" + "\n".join(f"- {reason}" for reason in reasons) + "\n")
    return "\n".join(parts)
