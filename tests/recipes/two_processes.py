"""What each of several processes does for ``test_two_processes.py``; a single process does the same, for comparison.

accelerate launch --multi_gpu --num_processes 2 -m tests.recipes.two_processes BASE FOLDER FLAGS

FLAGS are those of ``recipes/bert_qat.py``, which follows: starting processes takes longer than what they do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, BertForQuestionAnswering

from quantsim import CalibrationError, QuantConfig, QuantSim, Rule
from recipes import bert_qat
from recipes.data import encode
from recipes.evaluation import Evaluation, evaluate
from recipes.recipe import Qat, Training
from recipes.tasks import TASKS, RecipeError
from recipes.training import train
from tests.recipes.test_data import SQUAD
from tests.recipes.test_training import calibrated, job, qat_job, tiny
from tests.recipes.test_training import rows as training_rows
from tests.tiny import tiny_batch, tiny_bert

Ranges = dict[str, Tensor]


def everything(base: Path, folder: Path, processes: PartialState) -> dict[str, Any]:
    rank, world = processes.process_index, processes.num_processes
    return calibrations(rank, world) | evaluations(base, rank) | trainings(folder)


# ---- calibration ----


def calibrations(rank: int, world: int) -> dict[str, Any]:
    """Ranges from five batches dealt out in turn, from batches that one process has alone, and what is said to broken ones."""
    config = QuantConfig.preset("aimet").with_rules(
        Rule(module="*.layer.0.*", role="activation", set={"estimator": "running_min_max"}),
        Rule(module="*.layer.1.*", role="activation", set={"estimator": "percentile", "percentile": 99.0}),
    )
    sim = QuantSim(tiny_bert(), config)
    batches = [tiny_batch(rows=3 + seed, seed=seed) for seed in range(5)]

    def ranges() -> Ranges:
        return {f"{name}.{end}": getattr(q, end).detach().clone() for name, q in sim.quantizers.items() for end in ("min", "max")}

    last = rank == world - 1
    found: dict[str, Any] = {}
    sim.compute_encodings(batches[rank::world])
    found["dealt"] = ranges()
    sim.compute_encodings(batches if last else [])
    found["alone"] = ranges()
    found["empty batch"] = message(lambda: sim.compute_encodings([tiny_batch(rows=0)] if last else batches), CalibrationError)
    found["no batches"] = message(lambda: sim.compute_encodings([]), CalibrationError)
    with torch.no_grad():
        broken = sim.model.get_input_embeddings().weight  # type: ignore[operator]
        kept = broken.clone()
        broken[batches[0]["input_ids"][0, 0]] = torch.inf if last else 0.0
    found["infinity"] = message(lambda: sim.compute_encodings(batches[:1]), CalibrationError)
    with torch.no_grad():
        broken.copy_(kept)
    found["after errors"] = ranges()
    return found


def message(work: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    return ""


# ---- evaluation ----


def evaluations(base: Path, rank: int) -> dict[str, Any]:
    """Rows that don't divide evenly, fewer rows than processes, spans, and rows that one process cannot take."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list([{"sentence1": f"row {i}", "sentence2": "of " * (i % 5), "label": i % 2} for i in range(23)])
    encoded = encode(rows, TASKS["rte"], tokenizer, max_length=24)
    squad = Dataset.from_list(SQUAD)
    windows = encode(squad, TASKS["squad"], tokenizer, max_length=48)

    def run(model: torch.nn.Module, encoded: Dataset, task: str = "rte", batch_size: int = 4, **options: Any) -> Evaluation:
        return evaluate(model, encoded, TASKS[task], batch_size=batch_size, progress=False, **options)

    model, ragged = tiny_bert(), encode(rows, TASKS["rte"], tokenizer, padding=False)
    found = {f"{count} rows": run(model, encoded.select(range(count))) for count in (23, 8, 1)}
    found["spans"] = run(tiny_bert(BertForQuestionAnswering), windows, "squad", batch_size=1, rows=squad)
    plain: dict[str, Any] = {name: (e.metrics, e.predictions, e.logits, e.rows) for name, e in found.items()}
    plain["ragged"] = message(lambda: run(model, ragged if rank else encoded), RecipeError)
    return plain


# ---- training ----


def trainings(folder: Path) -> dict[str, Any]:
    """Weights after fine-tuning and after QAT, in float64, so that what differs by rounding stays small.

    21 rows make batches of 8, 8 and 5, and 17 make 8, 8 and 1; 23 in parts of 4 (``accumulate``) end in one of 3.
    """
    found: dict[str, Any] = {}
    for name, count, accumulate in (("fine-tuned", 21, 1), ("fine-tuned, a batch of one row", 17, 1), ("fine-tuned, in parts", 23, 2)):
        model = tiny(dropout=0.0).double()
        settings = Training(lr=5e-3, epochs=2, batch=8, accumulate=accumulate, mixed_precision="no")
        train(job(model, folder / name, rows=training_rows(count), settings=settings))
        found[name] = model.state_dict()
    sim = calibrated(tiny(dropout=0.0).double())
    train(qat_job(sim, folder / "qat", rows=training_rows(21), settings=Qat(lr=1e-3, epochs=2, batch=8)))
    found["qat"] = sim.model.state_dict()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, folder = map(Path, sys.argv[1:3])
    processes = PartialState(cpu=True)
    torch.save(everything(base, folder, processes), folder / f"{processes.process_index}.pt")
    sys.exit(bert_qat.main(sys.argv[3:]))
