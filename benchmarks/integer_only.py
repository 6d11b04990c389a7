"""Integer-only inference against FP32, the int8 lowering, and transformers' own I-BERT, interleaved in one run.

    python -m benchmarks.integer_only --rounds 7

All models have BERT-base's shape and random weights; each round runs every contender once, in an order that turns. Ratios are medians
over rounds of (FP32's time / the contender's, in the same round). FP32 is the transformers model as it loads, with fused attention,
and "ibert" is ``IBertModel`` with ``quant_mode``, whose integers are floating-point tensors. The floor is the model's 8-bit products
alone, on the kernels that integer-only uses, each rescaled to 8 bits: what else lies between them costs nothing in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, IBertConfig, IBertForSequenceClassification

from quantsim import QuantSim
from quantsim.kernels.int8_matmul import int8_matmul
from quantsim.kernels.integer_rows import IntegerRows, Op, Step
from quantsim.kernels.product_rows import ProductRows, missing_for_product_rows

SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "tiny": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99},
}
FP32, FLOOR = "FP32", "8-bit products alone (floor)"
Run = Callable[[], object]


def batch_of(rows: int, length: int, vocab: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, -length // 8 :] = 0
    return {"input_ids": torch.randint(3, vocab, (rows, length)), "attention_mask": mask}


def simulated(model: BertForSequenceClassification, preset: str, batch: dict[str, Tensor]) -> QuantSim:
    sim = QuantSim(model, preset)
    sim.compute_encodings([batch])
    return sim


def contenders(shape: str, rows: int, length: int, compiles: bool) -> dict[str, Run]:
    """Each contender's forward on the same batch."""
    torch.manual_seed(0)
    config = BertConfig(num_labels=2, **SHAPES[shape])
    model = BertForSequenceClassification(config).eval()
    batch = batch_of(rows, length, config.vocab_size)
    aimet, ibert = simulated(model, "aimet", batch), simulated(model, "ibert", batch)
    same = SHAPES[shape] | {"num_labels": 2, "vocab_size": config.vocab_size, "max_position_embeddings": length + 2}
    reference = IBertForSequenceClassification(IBertConfig(**same, quant_mode=True))
    reference.train()
    with torch.no_grad():
        reference(**batch)  # its ranges move in training alone
    models = {
        FP32: model,
        "lower(), preset aimet": aimet.lower().model,
        "integer only": ibert.integer_only().model,
        "transformers ibert, quant_mode": reference.eval(),
    }
    alone = products_alone(config, rows, length)
    if compiles:
        models["lower(), preset aimet, compiled"] = aimet.lower().compile().model
    return {name: forward(m, batch) for name, m in models.items()} | {FLOOR: alone}


def products_alone(config: BertConfig, rows: int, length: int) -> Run:
    """Every product of the layers, on random integers, and its sums to 8 bits; pooler and head are left out."""
    rescale = Step(Op.PUSH, (0,)), Step(Op.RESCALE, (1, 12, 0, -128, 127, 0))  # sums / 2**12
    fused = ProductRows(rescale, (), torch.int8, 0, True)
    apart = IntegerRows(rescale, (), torch.int8)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return fused(a, b) if not missing_for_product_rows() else apart(int8_matmul(a, b, kernel=True))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8)

    wide, narrow, heads = config.intermediate_size, config.hidden_size, config.num_attention_heads
    hidden, inner = integers(rows * length, narrow), integers(rows * length, wide)
    linears = [(hidden, integers(narrow, narrow).t())] * 4 + [(hidden, integers(wide, narrow).t()), (inner, integers(narrow, wide).t())]
    x = integers(rows, length, heads, narrow // heads).transpose(1, 2)
    scores = integers(rows, heads, length, length)
    attention = [(x, x.transpose(2, 3)), (scores, x)]

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for a, b in linears + attention:
                product(a, b)

    return run


def forward(model: Callable[..., object], batch: dict[str, Tensor]) -> Run:
    @torch.no_grad()
    def run() -> object:
        return model(**batch)

    return run


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(times: dict[str, list[float]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, seconds in times.items():
        ratios = sorted(base / own for base, own in zip(times[FP32], seconds, strict=True))
        spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        rows.append(
            {"model": name, "ms": 1e3 * statistics.median(seconds), "times as fast as FP32": statistics.median(ratios), "spread": spread}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="leave the compiled contender out: compiling takes minutes")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = rows_of(interleaved(contenders(args.shape, args.rows, args.length, not args.eager), args.rounds))
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
        settings = {"shape": args.shape, "rows": args.rows, "length": args.length, "threads": args.threads, "rounds": args.rounds}
        args.output.write_text(json.dumps({"results": results, "versions": versions, **settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
