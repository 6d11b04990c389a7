"""The README's tables of what integers cost, from the JSON that ``integer_only.py`` and ``integer_training.py`` write.

    python -m benchmarks.integer_only --eager --rounds 5 --output benchmarks/integer_only.json
    python -m benchmarks.integer_training --rounds 5 --output benchmarks/integer_training.json
    python -m benchmarks.tables

The last writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model_zoo.marked import in_marks

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
INFERENCE, TRAINING = "speed of integers alone", "speed of training in integers"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


def inference() -> str:
    rows = [(row["model"], f"{row['times as fast as FP32']:.2f} ({row['spread']})") for row in read("integer_only.json")["results"]]
    return tabulate(rows, ("BERT-base, 8 × 128, two threads", "times as fast as FP32"), tablefmt="github", disable_numparse=True)


def training() -> str:
    rows = [
        (row["model"], row["step"], f"{row['ratio']:.2f} ({row['spread']})", "" if row["floor"] is None else f"{row['floor']:.2f}")
        for row in read("integer_training.json")["results"]
    ]
    return tabulate(rows, ("model", "step", "times FP32's", "floor"), tablefmt="github", disable_numparse=True)


def in_readme(text: str) -> str:
    for name, made in ((INFERENCE, inference()), (TRAINING, training())):
        text = in_marks(text, name, made)
    return text


if __name__ == "__main__":
    README.write_text(in_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
