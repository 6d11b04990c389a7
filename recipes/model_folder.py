"""A model's folder as ``transformers`` knows it: what is in it is replaced whole, and what a stage before left is moved aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

MODEL = ("config.json", "*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "README.md", "results.json")
TRAINER_STATE = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "trainer_state.json",
    "training_args.bin",
    "rng_state*",
    "random_states*",
    "checkpoint-*",
    "stages",
)
"""What ``transformers.Trainer`` and our training leave beside a model to go on training it."""
STAGING = ".saving"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says; empty where there is none."""
    return read_json(folder / "config.json")


def described(model: PreTrainedModel) -> str:
    """A model in a few words, for a table of results.

    >>> from transformers import BertConfig, BertModel
    >>> described(BertModel(BertConfig(vocab_size=9, hidden_size=24)))
    'bert, 12 layers, 24 wide'
    """
    config = model.config
    return f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide"


def save_whole(folder: Path, *saves: Callable[[Path], object]) -> None:
    """Let each of ``saves`` write to a folder apart, then move its files here, the config last: all that are replaced are whole."""
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for save in saves:
        save(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    staging.rmdir()


def set_aside(folder: Path, patterns: Sequence[str], name: str) -> list[str]:
    """Move what fits a pattern to ``folder/name``; what was moved."""
    moved = sorted(path for path in _fitting(folder, patterns) if path.name != name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for path in moved:
        path.replace(folder / name / path.name)
    return [path.name for path in moved]


def _fitting(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern)}
