"""A checkpoint folder, and ways to damage it; ``reseal`` repairs the hashes, as someone who means harm would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantsim.formats.description import tensors_sha256

TENSORS, MODEL = FILES = ("model.safetensors", "config.json")
HEADER = "quantsim"


def description(folder: Path) -> dict[str, Any]:
    """What the header of ``model.safetensors`` says."""
    with safe_open(folder / TENSORS, "pt") as file:
        return json.loads(file.metadata()[HEADER])


def describe(folder: Path, **changes: Any) -> None:
    """Change fields of the header, and repair the hashes."""
    write(folder, load_file(folder / TENSORS), description(folder) | changes)
    if "sha256" not in changes:
        reseal(folder)


def write(folder: Path, tensors: dict[str, Tensor], values: Any) -> None:
    save_file(tensors, folder / TENSORS, metadata={"format": "pt", HEADER: json.dumps(values)})


def reseal(folder: Path) -> None:
    """Write the hashes that the files now have into the header, its own included."""
    tensors, values = load_file(folder / TENSORS), description(folder)
    values["sha256"] = {"tensors": tensors_sha256(tensors), "config.json": sha256((folder / MODEL).read_text())}
    values["sha256"]["description"] = sha256(json.dumps(values))
    write(folder, tensors, values)


def sha256(text: str) -> str:
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of ``config.json``, and repair the hashes."""
    values = json.loads((folder / MODEL).read_text())
    (folder / MODEL).write_text(json.dumps(values | changes))
    reseal(folder)


def edit_tensors(folder: Path, changes: dict[str, Tensor | None], sealed: bool = True) -> None:
    """Replace, add or (``None``) remove tensors."""
    tensors = load_file(folder / TENSORS) | changes
    write(folder, {name: x for name, x in tensors.items() if x is not None}, description(folder))
    if sealed:
        reseal(folder)
