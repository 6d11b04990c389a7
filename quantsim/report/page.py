"""An analysis, or two side by side → one HTML page that needs nothing but a browser."""

from __future__ import annotations

import json
import math
from html import escape
from importlib import import_module, resources
from typing import Any

from quantsim.report.analysis import MODES, Analysis
from quantsim.report.statistics import OUTLIER_RATIO, EdgeStatistics

SCRIPTS = ("format.js", "table.js", "plots.js", "main.js")


def render(analysis: Analysis, before: Analysis | None = None) -> str:
    """The page: styles, scripts, plotly.js and all figures in one file, with a policy that lets the browser fetch nothing.

    Raises:
        ImportError: ``plotly`` isn't installed.
    """
    need_plotly()
    from plotly.offline import get_plotlyjs

    parts = {
        "title": escape(analysis.subject.title),
        "style": _asset("page.css"),
        "plotly": get_plotlyjs(),
        "data": _in_script(json.dumps(page_data(analysis, before), allow_nan=False, separators=(",", ":"))),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
    }
    pieces = _asset("page.html").split("@@")  # text, name, text, name, …, text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def need_plotly() -> None:
    """See that plotly can be imported, before anything is measured.

    Raises:
        ImportError: it isn't installed; the message names the extra.
    """
    try:
        import_module("plotly.offline")
    except ImportError as error:
        raise ImportError(f"plotly is needed to write a report ({error}); pip install 'quantsim[report]' brings it") from error


def page_data(analysis: Analysis, before: Analysis | None) -> dict[str, Any]:
    """What the page's scripts read: figures are worked out here, rounded to what can be seen, and only shown there."""
    sides = [side for side in (analysis, before) if side is not None]
    rows: dict[str, dict[str, Any]] = {}
    for i, side in enumerate(sides):
        figures = _figures(side, by=analysis.subject.metric)
        for edge in side.subject.coverage:
            rows.setdefault(edge.name, {**edge._asdict(), "sides": [None] * len(sides)})["sides"][i] = figures.get(edge.name)
    return {
        "subjects": [_subject(side) for side in sides],
        "edges": list(rows.values()),
        "outlier": OUTLIER_RATIO,
    }


def _subject(side: Analysis) -> dict[str, Any]:
    subject = side.subject
    names = [name for name, q in zip((e.name for e in subject.coverage), subject.coverage, strict=True) if q.state not in ("none", "off")]
    return {
        "title": subject.title,
        "model": subject.model,
        "preset": subject.preset,
        "parameters": subject.parameters,
        "summary": subject.summary,
        "notes": subject.notes,
        "rows": side.seen.rows,
        "rowsWanted": subject.rows,
        "sensitivityRows": subject.sensitivity_rows,
        "metric": subject.metric,
        "device": subject.device,
        "created": subject.created,
        "versions": subject.versions,
        "outputs": _number(side.seen.outputs.db) if side.seen.batches and names else None,
        "scores": {name: _number(score, 6) for name, score in side.scores.items()},
        "complete": side.complete,
        "measured": {mode: len(side.sensitivity[mode]) for mode in MODES},
        "quantizers": len(set(names)),
    }


def _figures(side: Analysis, by: str) -> dict[str, dict[str, Any]]:
    """Edge → figures; sensitivity only where it was measured by the metric ``by``, for others have other units."""
    found = {}
    for name, s in side.edges.items():
        found[name] = _edge_figures(s)
        for mode, key in (("alone_on", "on"), ("alone_off", "off")):
            score = side.sensitivity[mode].get(name) if side.subject.metric == by else None  # type: ignore[index]
            found[name][key] = None if score is None else _number(score, 6)
    return found


def _edge_figures(s: EdgeStatistics) -> dict[str, Any]:
    ratios = s.outlier_ratios
    return {
        "values": s.values,
        "masked": s.masked,
        "low": _number(s.low, 5),
        "high": _number(s.high, 5),
        "histogram": _trimmed(s),
        "grid": None if s.grid is None else [_number(end, 7) for end in s.grid],
        "clippedLow": s.clipped_low,
        "clippedHigh": s.clipped_high,
        "clipped": None if s.grid is None else s.clipped,
        "own": None if s.own is None else _number(s.own.db, 5),
        "total": None if s.total is None or not math.isfinite(s.total.db) else _number(s.total.db, 5),
        "outlier": _number(max(ratios), 4) if ratios else None,
        "channels": [_number(x, 3) for x in s.channels],
        "outliers": list(s.outlier_channels),
    }


def _trimmed(s: EdgeStatistics) -> dict[str, Any] | None:
    """The histogram without the empty bins at its ends."""
    if s.histogram is None:
        return None
    counts = s.histogram.counts
    full = [i for i, count in enumerate(counts) if count]
    return {"width": s.histogram.width, "first": s.histogram.first + full[0], "counts": counts[full[0] : full[-1] + 1]}


def _number(x: float, digits: int = 4) -> float | str:
    """Rounded to significant digits; one that is not finite by its name."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else str(x)


def _in_script(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("quantsim.report").joinpath("assets", name).read_text(encoding="utf-8")
