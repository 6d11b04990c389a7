"""Measure what a report shows, with progress; what is done is kept, and an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, fx, nn
from tqdm import tqdm

from quantsim.config import QuantConfig
from quantsim.graph.place import Placement
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.report.analysis import FORMAT, MODES, Analysis, ReportError, Seen, Subject, is_analysis
from quantsim.report.coverage import covered_edges, inherited, summary
from quantsim.report.sensitivity import Metric, estimate_seconds, outputs_noise, outputs_sqnr, sensitivity
from quantsim.report.statistics import activation_statistics, weight_statistics
from quantsim.report.walk import Batch, nobody, outputs_of

SENSITIVITY_ROWS = 16
SAVE_EVERY = 5.0  # seconds


class Simulation(Protocol):
    """What is measured: a ``QuantSim``."""

    model: nn.Module
    graph: fx.GraphModule
    config: QuantConfig
    placements: list[Placement]

    @property
    def quantizers(self) -> dict[str, FakeQuantizer]: ...


class Measurement:
    """One analysis under way.

    Args:
        simulation: what to measure; nothing of it is changed.
        batches: of :func:`take_rows`.
        store: the JSON file that keeps the results. Results in it that have this fingerprint are gone on with, others replaced.
            A file that holds no results is refused.
        metric: what sensitivity is measured by; ``None`` is the SQNR of the outputs.
        sensitivity_rows: how many rows it sees; 0 leaves it out.
        title: the page's.
        progress: draw bars on stderr.
    """

    def __init__(
        self,
        simulation: Simulation,
        batches: Sequence[Batch],
        store: Path,
        *,
        metric: Metric | None,
        sensitivity_rows: int,
        title: str,
        progress: bool,
    ) -> None:
        self.simulation, self.batches, self.store, self.metric, self.progress = simulation, batches, store, metric, progress
        self.few = take_rows(batches, sensitivity_rows) if sensitivity_rows else []
        subject = _subject(simulation, title, count_rows(batches), count_rows(self.few), metric)
        key = fingerprint(simulation, batches, {"sensitivity_rows": subject.sensitivity_rows, "metric": _identity(metric)})
        self.analysis = _kept(store, key, title) or Analysis(key, subject)
        self._save_at = time.monotonic() + SAVE_EVERY

    def run(self) -> Analysis:
        """Measure what is left. However it ends, what was measured is in the file then."""
        try:
            if not self.analysis.complete:
                self._statistics()
                self._sensitivity()
                self.analysis.complete = True
        finally:
            self.analysis.write(self.store)
        return self.analysis

    def _statistics(self) -> None:
        analysis, graph = self.analysis, self.simulation.graph
        if not analysis.weights:
            analysis.weights = weight_statistics(graph)
        done = analysis.seen.batches
        with self._bar("values on every edge", len(self.batches), done, "batch") as bar:
            for batch in self.batches[done:]:
                edges, floating, simulated = activation_statistics(graph, self.simulation.placements, batch)
                outputs = outputs_noise([floating], [simulated], [batch])
                analysis.seen += Seen(1, count_rows([batch]), edges, outputs)
                self._step(bar)

    def _sensitivity(self) -> None:
        analysis, graph = self.analysis, self.simulation.graph
        names = [name for name, q in self.simulation.quantizers.items() if q.calibrated]
        left = {mode: [name for name in names if name not in analysis.sensitivity[mode]] for mode in MODES}
        if not self.few or not any(left.values()):
            return
        reference = outputs_of(graph, self.few, nobody)
        metric = self.metric or outputs_sqnr(reference)
        if not analysis.scores:
            analysis.scores = {"off": metric(reference, self.few), "on": metric(outputs_of(graph, self.few), self.few)}
        seconds = sum(estimate_seconds(graph, self.few, left[mode]) for mode in MODES)
        self._say(f"sensitivity of {len(names)} quantizers on {count_rows(self.few)} rows: about {_duration(seconds)}")
        for mode in MODES:
            done = len(names) - len(left[mode])
            with self._bar(f"each {mode.replace('_', ' ')}", len(names), done, "quantizer") as bar:
                for name, score in sensitivity(graph, self.few, mode, metric, left[mode]):
                    analysis.sensitivity[mode][name] = score
                    self._step(bar)

    def _step(self, bar: tqdm[Any]) -> None:
        bar.update()
        began = time.monotonic()
        if began > self._save_at:
            self.analysis.write(self.store)
            took = time.monotonic() - began
            self._save_at = time.monotonic() + max(SAVE_EVERY, 20 * took)  # large models' results take a while to write

    def _bar(self, title: str, total: int, done: int, unit: str) -> tqdm[Any]:
        return tqdm(total=total, initial=done, desc=title, unit=unit, disable=not self.progress)

    def _say(self, line: str) -> None:
        if self.progress:
            tqdm.write(line, file=sys.stderr)


def take_rows(batches: Iterable[Batch], rows: int | None, needed: Sequence[str] = (), device: torch.device | None = None) -> list[Batch]:
    """The batches of the first ``rows`` rows (the last one cut), on ``device``.

    Raises:
        ReportError: no rows, a batch that is no mapping of tensors by name or lacks one of the ``needed``, or is empty.
    """
    taken: list[Batch] = []
    left = rows
    for i, batch in enumerate(batches):
        if left == 0:
            break
        if not isinstance(batch, Mapping) or not all(isinstance(x, Tensor) and x.ndim for x in batch.values()):
            raise ReportError(f"batch {i} is {_described(batch)}; expected tensors of rows by name, as a tokenizer gives them")
        if lacking := [name for name in needed if name not in batch]:
            raise ReportError(f"batch {i} holds {', '.join(batch)}; the model also needs {', '.join(lacking)}")
        if any(x.numel() == 0 for x in batch.values()):
            raise ReportError(f"batch {i} is empty: { {name: list(x.shape) for name, x in batch.items()} }")
        taken.append({name: x[:left].to(device or x.device) for name, x in batch.items()})
        left = None if left is None else left - count_rows(taken[-1:])
    if not taken:
        raise ReportError("no batches; a DataLoader or generator that was used up before gives none")
    return taken


def count_rows(batches: Sequence[Batch]) -> int:
    """Rows of all batches."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def fingerprint(simulation: Simulation, batches: Sequence[Batch], settings: Mapping[str, Any]) -> str:
    """sha256 of all that results depend on: every parameter, range and state, the graph, the config, the batches, settings and versions."""
    described = {
        "format": FORMAT,
        "config": simulation.config.to_dict(),
        "graph": simulation.graph.code,
        "settings": settings,
        "versions": _versions(),
        "batches": [list(batch) for batch in batches],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    tensors = {**simulation.graph.state_dict(), **simulation.model.state_dict()}
    for name, x in [*sorted(tensors.items()), *(item for batch in batches for item in batch.items())]:
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identity(metric: Metric | None) -> Any:
    """What tells a metric apart: a plain function's code. One that carries values of its own (a closure, an object) is like no other."""
    if metric is None:
        return None
    if not inspect.isfunction(metric) or metric.__closure__ or metric.__defaults__ or metric.__kwdefaults__:
        return uuid.uuid4().hex
    return [metric.__module__, metric.__qualname__, _code(metric.__code__)]


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _kept(store: Path, key: str, title: str) -> Analysis | None:
    """The results in the file, where they are of this very analysis, under the title of now.

    Raises:
        ReportError: the file is no analysis: somebody's data, perhaps.
    """
    if not store.exists():
        return None
    if not is_analysis(store):
        raise ReportError(f"{store}: is no analysis, and would be replaced by one; give the page another name, or move the file away")
    try:
        analysis = Analysis.read(store)
    except ReportError:  # of another version, or damaged
        return None
    if analysis.fingerprint != key:
        return None
    analysis.subject = replace(analysis.subject, title=title)
    return analysis


def _subject(simulation: Simulation, title: str, rows: int, sensitivity_rows: int, metric: Metric | None) -> Subject:
    model = simulation.model
    return Subject(
        title=title,
        model=type(model).__name__,
        preset=simulation.config.name,
        parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("quantizers.")),
        summary=summary(simulation.placements),
        coverage=tuple(covered_edges(simulation.placements, simulation.quantizers)),
        notes=tuple(inherited(simulation.graph)),
        rows=rows,
        sensitivity_rows=sensitivity_rows,
        metric="" if metric is None else getattr(metric, "__name__", type(metric).__name__),
        device=str(next(model.parameters()).device),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _described(batch: object) -> str:
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}"
    return "{" + ", ".join(f"{name}: {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for name, x in batch.items()) + "}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
