"""All that a report shows, as data: written to JSON while it is measured, read from it to go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from quantsim.numerics.sqnr import Noise
from quantsim.report.coverage import CoveredEdge
from quantsim.report.sensitivity import Mode
from quantsim.report.statistics import EdgeStatistics

FORMAT = 1
MODES: tuple[Mode, Mode] = ("alone_on", "alone_off")


class ReportError(ValueError):
    """A report that cannot be made, or a file of results that cannot be read: the message says which and why."""


@dataclass(frozen=True)
class Subject:
    """What was looked at, and how.

    Attributes:
        title: the page's.
        model, preset: the model's class and the config's name.
        parameters: of the model, counted once.
        coverage: a row for each edge that computes; ``notes`` is about those that do not.
        rows, sensitivity_rows: that were to be seen.
        metric: the name of what sensitivity is measured by; empty for the outputs' SQNR.
        device, created, versions: where, when and with what.
    """

    title: str
    model: str
    preset: str
    parameters: int
    summary: str
    coverage: tuple[CoveredEdge, ...]
    notes: tuple[str, ...]
    rows: int
    sensitivity_rows: int
    metric: str
    device: str
    created: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Seen:
    """The statistics of the batches so far.

    Attributes:
        batches, rows: how many.
        edges: activations' statistics by name.
        outputs: the model's outputs, floating point against simulated, padded positions left out.
    """

    batches: int = 0
    rows: int = 0
    edges: dict[str, EdgeStatistics] = field(default_factory=dict)
    outputs: Noise = field(default_factory=Noise)

    def __add__(self, other: Seen) -> Seen:
        edges = {name: self.edges[name] + s if name in self.edges else s for name, s in other.edges.items()}
        return Seen(self.batches + other.batches, self.rows + other.rows, edges, self.outputs + other.outputs)


@dataclass
class Analysis:
    """What was measured so far.

    Attributes:
        fingerprint: of the model's state, the config, the batches and the settings: results of another one are never gone on with.
        weights: weights' statistics by name.
        seen: activations' and outputs' statistics.
        scores: of the metric with all quantizers off and on; ``{"off": …, "on": …}`` once they are measured.
        sensitivity: mode → quantizer's name → score.
        complete: nothing is left to measure.
    """

    fingerprint: str
    subject: Subject
    weights: dict[str, EdgeStatistics] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    scores: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[Mode, dict[str, float]] = field(default_factory=lambda: {mode: {} for mode in MODES})
    complete: bool = False

    @property
    def edges(self) -> dict[str, EdgeStatistics]:
        """Statistics of every edge that has some."""
        return {**self.weights, **self.seen.edges}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; a number that is not finite is its name (``"inf"``)."""
        values = asdict(self)
        values["subject"]["coverage"] = [edge._asdict() for edge in self.subject.coverage]
        plain: dict[str, Any] = _plain(values)
        return plain

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        body = json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))
        document = f'{{"format":{FORMAT},"sha256":"{_sha256(body)}","analysis":{body}}}\n'
        write_whole(path, document)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ReportError: no such file, another format, or a file that was changed or damaged.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ReportError(f"{path}: cannot be read ({error.strerror}); expected the .json beside an earlier report") from error
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{path}: no JSON ({error}); expected the .json beside an earlier report") from error
        if not _is_document(document):
            raise ReportError(f"{path}: expected an object with format, sha256 and analysis, as it stands beside an earlier report")
        if document["format"] != FORMAT:
            raise ReportError(f"{path}: format {document['format']!r}; this version reads format {FORMAT}")
        if document["sha256"] != _sha256(json.dumps(document["analysis"], separators=(",", ":"))):
            raise ReportError(f"{path}: its contents do not match its own sha256. The file was changed or damaged")
        return cls._from_dict(document["analysis"])

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Self:
        subject, seen = dict(values["subject"]), values["seen"]
        subject["coverage"] = tuple(CoveredEdge(**edge) for edge in subject["coverage"])
        subject["notes"] = tuple(subject["notes"])
        return cls(
            fingerprint=values["fingerprint"],
            subject=Subject(**subject),
            weights={name: EdgeStatistics.from_dict(edge) for name, edge in values["weights"].items()},
            seen=Seen(
                batches=seen["batches"],
                rows=seen["rows"],
                edges={name: EdgeStatistics.from_dict(edge) for name, edge in seen["edges"].items()},
                outputs=Noise(**seen["outputs"]),
            ),
            scores={name: float(score) for name, score in values["scores"].items()},
            sensitivity={mode: {name: float(score) for name, score in values["sensitivity"][mode].items()} for mode in MODES},
            complete=values["complete"],
        )


def is_analysis(path: Path) -> bool:
    """Whether :meth:`Analysis.write` wrote the file, in whatever version, or began to."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    try:
        return _is_document(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _is_document(document: object) -> bool:
    return isinstance(document, dict) and {"format", "sha256", "analysis"} <= set(document)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.writing")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
