"""The table of results, from the cards and from what others published: ``results.csv`` and the README's section.

``python -m model_zoo results`` writes both; nothing in them is typed.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model_zoo.cards import Card, find, names
from model_zoo.format import RECIPE_ONLY
from model_zoo.marked import in_marks
from recipes.tasks import MODEL_CONFIGS, TASKS

ROOT = Path(__file__).resolve().parents[1]
CSV, PUBLISHED, README = ROOT / "model_zoo" / "results.csv", ROOT / "model_zoo" / "published.csv", ROOT / "README.md"
MARKS = "results"
FIELDS = (
    "source", "model", "config", "task", "metric", "rows", "fp32", "ptq_min_max", "ptq_best", "ptq_best_estimator", "qat", "qat_minus_fp32",
    "seeds", "fp32_median", "qat_median", "fp32_least", "fp32_greatest", "qat_least", "qat_greatest", "note",
)  # fmt: skip
HEADERS = ("task", "metric", "model, source", "rows", "FP32", "PTQ (min-max)", "PTQ (best estimator)", "QAT", "QAT − FP32")
OURS = "quantsim"

Row = dict[str, str]


def rows(cards: Sequence[Card]) -> list[Row]:
    """A row a card, the mean over the measured W8A8 tasks, and the published figures of others."""
    ours = [_row(card) for card in cards]
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        others = [_published(values) for values in csv.DictReader(file)]
    return [*ours, *_mean(ours), *others]


def _row(card: Card) -> Row:
    task = TASKS[card.task]
    row = dict.fromkeys(FIELDS, "") | {"source": OURS, "model": _model(card), "config": card.name, "task": card.task, "metric": task.metric}
    if card.where == RECIPE_ONLY:
        return row | {"note": RECIPE_ONLY}
    fp32, ptq, qat = (card.metrics[what][task.metric] for what in ("fp32", "ptq", "qat"))
    tried = {card.quantization["activations"]["estimator"]: ptq} | {name: m[task.metric] for name, m in card.estimators.items()}
    best = max(tried, key=lambda name: tried[name])
    row |= {
        "rows": str(card.metrics["fp32"]["rows"]),
        "fp32": _text(fp32),
        "ptq_min_max": _text(tried["min_max"]) if "min_max" in tried else "",
        "ptq_best": _text(tried[best]),
        "ptq_best_estimator": best,
        "qat": _text(qat),
        "qat_minus_fp32": _text(qat - fp32, sign=True),
    }
    if card.sweep:
        row |= {"seeds": " ".join(f"{seed} (×{n})" if n > 1 else str(seed) for seed, n in Counter(card.sweep["seeds"]).items())}
        row |= {f"{what}_{name}": _text(card.sweep[what][name]) for what in ("fp32", "qat") for name in ("median", "least", "greatest")}
    return row


def _model(card: Card) -> str:
    name = card.base_model["name"].rpartition("/")[2]
    return f"{name} (6 layers, 384 wide)" if name == "all-MiniLM-L6-v2" else name


def _mean(ours: Sequence[Row]) -> Iterator[Row]:
    measured = [row for row in ours if row["fp32"] and row["config"] in MODEL_CONFIGS]
    if not measured:
        return
    names = ("fp32", "ptq_min_max", "ptq_best", "qat")
    means = {name: sum(float(row[name]) for row in measured) / len(measured) for name in names}
    yield dict.fromkeys(FIELDS, "") | {
        "source": OURS,
        "model": measured[0]["model"],
        "task": "mean",
        "metric": f"mean of {', '.join(row['task'] for row in measured)}",
        "qat_minus_fp32": _text(means["qat"] - means["fp32"], sign=True),
        **{name: _text(means[name]) for name in names},
    }


def _published(values: Mapping[str, str]) -> Row:
    row = dict.fromkeys(FIELDS, "") | {name: values[name] for name in ("source", "model", "task", "metric", "fp32", "qat")}
    difference = _text(float(values["qat"]) - float(values["fp32"]), sign=True)
    return row | {"ptq_min_max": values["ptq"], "qat_minus_fp32": difference, "note": "published by its authors, not measured here"}


def _text(value: float, sign: bool = False) -> str:
    return f"{value:+.2f}" if sign else f"{value:.2f}"


# ---- written ----


def csv_text(found: Sequence[Row], fields: Sequence[str] = FIELDS) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def markdown(found: Sequence[Row]) -> str:
    """The README's table: for each task what was measured here, then what others published."""
    order = [*TASKS, "mean"]
    chosen = sorted(
        (row for row in found if row["source"] != OURS or not row["config"] or row["config"] in MODEL_CONFIGS),
        key=lambda row: order.index(row["task"]),
    )
    return _table([_line(row) for row in chosen])


def variants(found: Sequence[Row]) -> str:
    """The same columns for the configs in other bits."""
    return _table([_line(row) for row in found if row["config"] and row["config"] not in MODEL_CONFIGS])


def spreads(found: Sequence[Row]) -> str:
    """Median, least and greatest over seeds, where a sweep was run."""
    lines = [
        (
            row["config"],
            row["metric"],
            row["seeds"],
            *(f"{row[f'{x}_median']} ({row[f'{x}_least']} to {row[f'{x}_greatest']})" for x in ("fp32", "qat")),
        )
        for row in found
        if row["seeds"]
    ]
    return tabulate(
        lines, ("config", "metric", "seeds", "FP32, median (least to greatest)", "QAT"), tablefmt="github", disable_numparse=True
    )


def _line(row: Row) -> tuple[Any, ...]:
    ours = row["source"] == OURS
    who = f"{row['model']}, measured here" if ours else f"{row['model']}, published by {row['source']}"
    best = f"{row['ptq_best']} ({row['ptq_best_estimator']})" if row["ptq_best_estimator"] else row["ptq_best"]
    figures = (row["rows"], row["fp32"], row["ptq_min_max"], best, row["qat"], row["qat_minus_fp32"])
    if row["note"] == RECIPE_ONLY:
        figures = ("", RECIPE_ONLY, "", "", "", "")
    name = row["config"] if ours and row["config"] not in MODEL_CONFIGS and row["config"] else row["task"]
    return (name, row["metric"], who, *figures)


def _table(lines: Sequence[tuple[Any, ...]]) -> str:
    return tabulate(lines, HEADERS, tablefmt="github", disable_numparse=True, colalign=("left",) * 3 + ("right",) * 6)


def section(found: Sequence[Row]) -> str:
    """What stands between the README's marks."""
    parts = [markdown(found)]
    if any(row["config"] and row["config"] not in MODEL_CONFIGS for row in found):
        parts.append("Other schemes, same tasks and model:\n\n" + variants(found))
    if any(row["seeds"] for row in found):
        again = " (×: runs of the same recipe on other CPUs, where sums in bf16 have another order)"
        parts.append(f"Over seeds{again if any('×' in row['seeds'] for row in found) else ''}:\n\n" + spreads(found))
    return "\n\n".join(parts)


def in_readme(text: str, found: Sequence[Row]) -> str:
    """The README with its section made anew."""
    return in_marks(text, MARKS, section(found))


def write() -> None:
    """``results.csv`` and the README's section, from the cards."""
    found = rows([find(name) for name in names()])
    CSV.write_text(csv_text(found), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), found), encoding="utf-8")
