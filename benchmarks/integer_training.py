"""A training step in integers against the FP32 step it replaces: forward, backward and AdamW, interleaved in one run.

    python -m benchmarks.integer_training --rounds 7

Ratios are medians over rounds of (integers / FP32 in the same round); FP32 is the transformers model as it loads, with fused
attention. The floor is the ratio if the linears' three products took what they take on integers by themselves, measured beside, and
everything else what it takes in FP32: mapping costs nothing in it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from benchmarks.simulation import SHAPES
from quantsim import IntegerConfig, IntegerTraining
from quantsim.kernels.integer_matmul import multiply
from quantsim.numerics.fixed_point import to_fixed_point_by
from quantsim.numerics.fused import fused_kernels

Step = Callable[[], None]


def step_of(model: nn.Module, batch: dict[str, Tensor], fused: bool, autocast: bool = False) -> Step:
    """One optimizer step on the batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with fused_kernels(fused), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        with fused_kernels(fused):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(config: Any, rows: int, length: int, bits: Sequence[int], fused: bool) -> dict[str, Step]:
    """A step of each kind, on models of their own with the same weights."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(0, config.vocab_size, (rows, length)), "labels": torch.randint(0, 2, (rows,))}
    batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    found = {"FP32": step_of(copy.deepcopy(model), batch, False), "bf16 autocast": step_of(copy.deepcopy(model), batch, False, True)}
    for b in bits:
        training = IntegerTraining(copy.deepcopy(model), IntegerConfig(b, b, b))
        found[f"integers, {b} bits"] = step_of(training.model, batch, fused)
    return found


def interleaved(work: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind in each round; the order is turned every round, and two steps come before."""
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        work[name]()
        work[name]()
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            start = time.perf_counter()
            work[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median_seconds(run: Callable[[], object], times: int = 5) -> float:
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def product_seconds(config: Any, tokens: int, bits: int | None) -> float:
    """Of all linears' products in a step, in float32 or (``bits``) on integers: ``Y``, ``dX`` and ``dW`` of each, at their shapes."""
    wide, inner = config.hidden_size, config.intermediate_size
    total = 0.0
    for out, into, count in ((wide, wide, 4), (inner, wide, 1), (wide, inner, 1)):
        x, w, g = (torch.randn(shape) for shape in ((tokens, into), (out, into), (tokens, out)))
        if bits is None:
            products: list[Callable[[], object]] = [partial(torch.matmul, a, b) for a, b in ((x, w.t()), (g, w), (g.t(), x))]
        else:
            (xq, wq, gq), by_column = (to_fixed_point_by(0, t, bits) for t in (x, w, g)), to_fixed_point_by(1, g, bits)
            pairs = ((xq, wq.t()), (gq, wq.without_exponent()), (by_column.t(), xq.without_exponent()))
            products = [partial(multiply, a, b) for a, b in pairs]
        total += count * config.num_hidden_layers * sum(map(median_seconds, products))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 10, 16])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="don't compile elementwise kernels")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for name in args.models:
        times = interleaved(steps(SHAPES[name], args.rows, args.length, args.bits, args.fused), args.rounds)
        gc.collect()
        tokens = args.rows * args.length
        in_float = product_seconds(SHAPES[name], tokens, None)
        in_integers = {f"integers, {b} bits": product_seconds(SHAPES[name], tokens, b) for b in args.bits}
        fp32 = statistics.median(times["FP32"])
        for kind, found in times.items():
            ratios = sorted(a / b for a, b in zip(found, times["FP32"], strict=True))
            floor = (fp32 - in_float + in_integers[kind]) / fp32 if kind in in_integers else None
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            row = {"model": name, "step": kind, "ms": 1e3 * statistics.median(found), "ratio": statistics.median(ratios)}
            results.append({**row, "spread": spread, "floor": floor})
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
        settings = {name: getattr(args, name) for name in ("rows", "length", "threads", "rounds", "fused")}
        args.output.write_text(json.dumps({"results": results, "versions": versions, **settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
