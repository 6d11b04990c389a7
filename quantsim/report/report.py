"""The report: measure, write the results, write the page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quantsim.report.analysis import Analysis, ReportError, write_whole
from quantsim.report.measure import SENSITIVITY_ROWS, Measurement, Simulation, count_rows, take_rows
from quantsim.report.page import need_plotly, render
from quantsim.report.sensitivity import Metric
from quantsim.report.walk import Batch


def write_report(
    simulation: Simulation,
    batches: Iterable[Batch],
    path: str | Path,
    *,
    before: Simulation | str | Path | None = None,
    metric: Metric | None = None,
    sensitivity: bool = True,
    rows: int | None = 64,
    sensitivity_rows: int | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Path:
    """Measure a simulation and write the page; see ``QuantSim.report``."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        raise ReportError(f"{path}: expected the name of the page, as report.html")
    for name, number in (("rows", rows), ("sensitivity_rows", sensitivity_rows)):
        if number is not None and number < 1:
            raise ReportError(f"{name} is {number}; expected 1 or more")
    need_plotly()
    needed = [str(node.target) for node in simulation.graph.graph.find_nodes(op="placeholder") if not node.args]
    taken = take_rows(batches, rows, needed, next(simulation.model.parameters()).device)
    few = (sensitivity_rows or (count_rows(taken) if metric else SENSITIVITY_ROWS)) if sensitivity else 0
    title = title or type(simulation.model).__name__

    def measurement(one: Simulation, store: Path, title: str) -> Measurement:
        return Measurement(one, taken, store, metric=metric, sensitivity_rows=few, title=title, progress=progress)

    other: Measurement | None = None
    earlier: Analysis | None = None
    if isinstance(before, (str, Path)):
        earlier = Analysis.read(before)  # before its file may be written anew
    elif before is not None:
        other = measurement(before, path.with_suffix(".before.json"), f"{title}, before")
        earlier = other.analysis
    measured = measurement(simulation, path.with_suffix(".json"), title)
    try:
        if other is not None:
            other.run()
        measured.run()
    except KeyboardInterrupt:
        write_whole(path, render(measured.analysis, earlier))
        raise
    write_whole(path, render(measured.analysis, earlier))
    return path
