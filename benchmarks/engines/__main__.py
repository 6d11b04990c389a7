"""Ours and every peer that is installed: same weights, same inputs, two threads each, interleaved in one run.

    pip install -e ".[bench]" && python -m benchmarks.engines

Each engine runs in a process of its own; they take turns, one forward each, and medians of the turns are compared. Writes
``engines.csv``, ``engines.md`` and ``engines.png`` beside this file, after each shape; what these hold of other models and shapes stays.
Engines that fail or are not installed are named, with the reason.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.engines.engines import BASELINE, ENGINES, OWN_VENV
from benchmarks.engines.inputs import MODELS, operations, write_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Row = dict[str, Any]
SHAPES = [(rows, tokens) for tokens in (32, 128, 384) for rows in (1, 8, 32)]


class Worker:
    """A process that runs one engine."""

    def __init__(self, engine: str, folder: Path, threads: int, python: str) -> None:
        self.engine = engine
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", "benchmarks.engines.worker", engine, str(folder), str(threads)]
        log = (folder / f"{engine}.log").open("w")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        self.error = str(self._answer().get("error", ""))

    def seconds(self, rows: int, tokens: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps({"run": [rows, tokens]}), file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            self.error = str(answer["error"])
            return float("nan")
        return float(answer["seconds"])  # type: ignore[arg-type]

    def _answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{tokens}" for rows, tokens in SHAPES], help="rows × tokens, as 8x128")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7, help="forwards of each engine and shape; medians are taken")
    parser.add_argument("--output", type=Path, default=HERE, help="where engines.csv, engines.md and engines.png are written")
    args = parser.parse_args(arguments)
    engines = list(dict.fromkeys([BASELINE, *args.engines]))
    shapes = [(int(rows), int(tokens)) for rows, tokens in (shape.split("x") for shape in args.shapes)]
    for name in args.models:
        for rows in measure(name, engines, shapes, args.threads, args.turns):
            write(args.output, [*others(args.output, rows), *rows])
    return 0


def measure(name: str, engines: Sequence[str], shapes: Sequence[tuple[int, int]], threads: int, turns: int) -> Iterator[list[Row]]:
    """For each shape a row an engine."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(name, folder)
        workers = []
        for engine in engines:
            python = environment_of(engine)
            worker = Worker(engine, folder, threads, python) if python else None
            if worker is None or worker.error:
                print(f"{name}: {engine} is left out: {worker.error if worker else 'no environment for it'}", flush=True)
            if worker is not None:
                stack.callback(worker.close)
                if not worker.error:
                    workers.append(worker)
        rate = product_rate(threads)
        for rows, tokens in shapes:
            times: dict[str, list[float]] = {worker.engine: [] for worker in workers}
            for turn in range(turns + 2):  # the first two warm up
                for worker in list(workers):
                    seconds = worker.seconds(rows, tokens)
                    if worker.error:
                        print(f"{name} {rows}x{tokens}: {worker.engine} is left out: {worker.error}", flush=True)
                        workers.remove(worker)
                        del times[worker.engine]
                    elif turn > 1:
                        times[worker.engine].append(seconds)
            medians = {engine: statistics.median(found) for engine, found in times.items()}
            floor = operations(name, rows, tokens) / rate
            yield [
                {
                    "model": name,
                    "rows": rows,
                    "tokens": tokens,
                    "engine": engine,
                    "milliseconds": round(seconds * 1e3, 3),
                    "times_fp32": round(medians[BASELINE] / seconds, 3),
                    "times_floor": round(seconds / floor, 3),
                    "least_milliseconds": round(min(times[engine]) * 1e3, 3),
                    "turns": turns,
                }
                for engine, seconds in medians.items()
            ]
            print(f"{name} {rows}x{tokens}: " + ", ".join(f"{e} {medians[BASELINE] / s:.2f}" for e, s in medians.items()), flush=True)


def environment_of(engine: str) -> str:
    """The interpreter for an engine; a venv is made for one whose packages don't fit beside the others (once, in the user's cache)."""
    if engine not in OWN_VENV:
        return sys.executable
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quantsim" / "benchmarks" / engine.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *OWN_VENV[engine]], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-e", str(ROOT)], check=True)
        except subprocess.CalledProcessError as error:
            print(f"{engine}: {error}")
            return ""
        (folder / "whole").touch()
    return str(python)


def product_rate(threads: int) -> float:
    """Operations a second of the int8 kernel on BERT-base's largest product: the floor is what the linears would take at this rate."""
    from quantsim.kernels.edges import Grid
    from quantsim.kernels.int8_linear import Int8Linear, Output

    torch.set_num_threads(threads)
    weight = torch.randint(-128, 128, (3072, 768), dtype=torch.int8)
    product = Int8Linear(weight, torch.ones(3072), torch.zeros(3072), Grid(0.1, 10, 0, 255))
    product.give([Output(3072, Grid(100.0, 128, 0, 255))])
    q = torch.randint(0, 256, (1024, 768), dtype=torch.uint8)
    seconds = []
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            product(q)
            seconds.append(time.perf_counter() - began)
    return 2.0 * 1024 * 768 * 3072 / statistics.median(seconds[5:])


def others(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """What the CSV holds of other models and shapes."""
    path = folder / "engines.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kept: list[Row] = [{k: int(v) if k in ("rows", "tokens", "turns") else v for k, v in row.items()} for row in csv.DictReader(file)]
    return [row for row in kept if not any(all(row[key] == new[key] for key in ("model", "rows", "tokens")) for new in rows)]


def write(folder: Path, rows: Sequence[Row]) -> None:
    """The CSV, the table that the README shows, and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    models, engines = list(MODELS), list(ENGINES)
    rows = sorted(rows, key=lambda row: (models.index(row["model"]), row["tokens"], row["rows"], engines.index(row["engine"])))
    with (folder / "engines.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "engines.md").write_text(table(rows))
    plot(folder / "engines.png", rows)


def table(rows: Sequence[Row]) -> str:
    """Times faster than eager FP32 torch, a line an engine, a column a shape."""
    parts = [f"Times faster than eager FP32 torch; {machine()}."]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        shapes = list(dict.fromkeys((row["rows"], row["tokens"]) for row in mine))
        lines = []
        for engine in sorted({row["engine"] for row in mine}, key=list(ENGINES).index):
            found = {(row["rows"], row["tokens"]): float(row["times_fp32"]) for row in mine if row["engine"] == engine}
            lines.append([engine, *(found.get(shape) for shape in shapes)])
        parts.append(tabulate(lines, [str(name), *(f"{a}×{b}" for a, b in shapes)], tablefmt="github", floatfmt=".2f"))
    return "\n\n".join(parts) + "\n"


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(7 * len(names), 7), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["model"] == name and (row["rows"], row["tokens"]) == (8, 128)] or [
            row for row in rows if row["model"] == name
        ]
        engines = [str(row["engine"]) for row in mine]
        values = [float(row["times_fp32"]) for row in mine]
        bars = axis.barh(engines, values, color=["tab:orange" if engine.startswith("ours") else "tab:gray" for engine in engines])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{name}, {mine[0]['rows']} × {mine[0]['tokens']}")
        axis.set_xlabel("times faster than eager FP32 torch")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
