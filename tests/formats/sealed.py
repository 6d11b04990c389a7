"""A checkpoint folder, and ways to damage it; ``reseal`` repairs the hashes, as someone who means harm would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, MODEL, SIM = FILES = ("model.safetensors", "config.json", "quantsim.json")


def reseal(folder: Path) -> None:
    """Write the hashes that the files now have into ``quantsim.json``, its own included."""
    description = json.loads((folder / SIM).read_text())
    description["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (TENSORS, MODEL)}
    description["sha256"][SIM] = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    (folder / SIM).write_text(json.dumps(description))


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change fields of one of the JSON files, and repair the hashes."""
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))
    reseal(folder)


def edit_tensors(folder: Path, changes: dict[str, Tensor | None], sealed: bool = True) -> None:
    """Replace, add or (``None``) remove tensors."""
    tensors = load_file(folder / TENSORS) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / TENSORS, metadata={"format": "pt"})
    if sealed:
        reseal(folder)
