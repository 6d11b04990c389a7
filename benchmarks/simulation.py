"""Simulation against the FP32 model it simulates: evaluation, calibration pass and QAT step, interleaved in one run.

    python benchmarks/simulation.py --rounds 7

Ratios are medians over rounds of (ours / FP32 in the same round); FP32 is the transformers model as it loads, with fused
attention. The floor is the ratio if each quantizer were one fused kernel at this machine's measured copy rate: it must
read and write its tensor once (evaluation), read it once (calibration), or in a QAT step read it, write the result and
what backward needs, then read that and the gradient and write a gradient (fused kernels need nothing written: they keep the input).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from quantsim import QuantSim
from quantsim.numerics.fused import fused_kernels
from quantsim.quantizers.fake_quantizer import State, WeightQuantizer

SHAPES = {
    "BERT-base shape (12x768)": BertConfig(num_labels=2),
    "MiniLM shape (6x384)": BertConfig(num_labels=2, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
}
COPIES = {"evaluation": 1.0, "calibration": 0.5, "QAT step": 3.0, "QAT step, fused": 2.5}  # a copy is one read and one write


@dataclass
class Work:
    """A model and its simulation on one batch."""

    model: nn.Module
    sim: QuantSim
    batch: dict[str, Tensor]
    labels: Tensor


def make(config: BertConfig, rows: int, length: int) -> Work:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, config.vocab_size, (rows, length)), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    batch["attention_mask"][:, -length // 8 :] = 0
    sim = QuantSim(model)
    sim.compute_encodings([batch])
    return Work(model, sim, batch, torch.randint(0, 2, (rows,)))


def evaluation(work: Work) -> tuple[Callable[[], object], Callable[[], object]]:
    def run(model: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def forward() -> object:
            return model.eval()(**work.batch) if model.training else model(**work.batch)

        return forward

    return run(work.model), run(work.sim.model)


def calibration(work: Work) -> tuple[Callable[[], object], Callable[[], object]]:
    """One more batch of an activation calibration that is under way."""
    fp32, ours = evaluation(work)

    def observe() -> object:
        for quantizer in work.sim.quantizers.values():
            if not isinstance(quantizer, WeightQuantizer):
                quantizer.state = State.ESTIMATING
        return ours()

    return fp32, observe


def qat_step(work: Work) -> tuple[Callable[[], object], Callable[[], object]]:
    def run(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

        def step() -> None:
            model.train()
            model(**work.batch, labels=work.labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return run(work.model), run(work.sim.model)


def fused_qat_step(work: Work) -> tuple[Callable[[], object], Callable[[], object]]:
    """:func:`qat_step` with the fake quantizers as compiled kernels."""
    fp32, ours = qat_step(work)

    def step() -> None:
        with fused_kernels() as works:
            assert works, "torch.compile needs a C++ compiler"
            ours()

    return fp32, step


def interleaved(pair: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    for work in pair:
        work()
        work()
    times = []
    for i in range(rounds):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        seconds = [0.0, 0.0]
        for k in order:
            start = time.perf_counter()
            pair[k]()
            seconds[k] = time.perf_counter() - start
        times.append((seconds[0], seconds[1]))
    return times


def quantized_elements(work: Work) -> tuple[int, int]:
    """Elements that pass through activation (and embedding-row) quantizers in a forward, and through weight quantizers in a step."""
    counts = {"activation": 0, "weight": 0}

    def count(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        whole_weight = isinstance(quantizer, WeightQuantizer) and isinstance(args[0], nn.Parameter)
        counts["weight" if whole_weight else "activation"] += args[0].numel()

    hooks = [q.register_forward_pre_hook(count) for q in work.sim.quantizers.values()]
    evaluation(work)[1]()
    for hook in hooks:
        hook.remove()
    return counts["activation"], counts["weight"]


def copy_rate(elements: int = 1 << 20) -> float:
    """Float32 elements a second of a copy of a tensor of 4 MB, the size of an activation here."""
    source, target = torch.randn(elements), torch.empty(elements)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return elements / statistics.median(times)


def floor(kind: str, elements: tuple[int, int], fp32: float) -> float:
    """The least ratio to FP32 at the measured copy rate; frozen weights cost nothing outside training."""
    activations, weights = elements
    return 1 + COPIES[kind] * (activations + weights * kind.startswith("QAT")) / copy_rate() / fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for name, config in SHAPES.items():
        work = make(config, args.rows, args.length)
        elements = quantized_elements(work)
        for kind, pair in (
            ("evaluation", evaluation),
            ("QAT step", qat_step),
            ("QAT step, fused", fused_qat_step),
            ("calibration", calibration),
        ):
            times = interleaved(pair(work), args.rounds)
            ratios = sorted(ours / fp32 for fp32, ours in times)
            least = floor(kind, elements, statistics.median(fp32 for fp32, _ in times))
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            results.append({"model": name, "work": kind, "ratio": statistics.median(ratios), "spread": spread, "floor": least})
            gc.collect()
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
        shape = {"rows": args.rows, "length": args.length, "threads": args.threads, "rounds": args.rounds}
        args.output.write_text(json.dumps({"results": results, "versions": versions, **shape}, indent=1) + "\n")


if __name__ == "__main__":
    main()
