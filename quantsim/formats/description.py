"""What a checkpoint's safetensors header says of it, under ``quantsim``: class, quantizers, versions, and hashes of everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 2
METHOD = "quantsim"
FIELDS = {"format": int, "architecture": str, "quantizers": dict, "tied": dict, "versions": dict, "sha256": dict}
WRITTEN_BY = "a file written by QuantSim.save_pretrained or by save_pretrained of its model"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is: the message names the file, the field, and what was expected."""


@dataclass(frozen=True)
class Description:
    """What there is to know of the tensors beside them.

    Attributes:
        architecture: the model's class.
        quantizers: the :class:`QuantSpec` of each, as JSON.
        tied: names of tensors that are another's, ``{alias: name}``.
    """

    architecture: str
    quantizers: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]

    def sealed(self, tensors: Mapping[str, Tensor], model_config: Mapping[str, Any]) -> dict[str, str]:
        """The header's metadata: this description with the hashes of the tensors, of ``config.json`` and of itself."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        values = asdict(self) | {"format": FORMAT, "versions": versions}
        values["sha256"] = {"tensors": tensors_sha256(tensors), "config.json": json_sha256(model_config)}
        values["sha256"]["description"] = json_sha256(values)
        return {"format": "pt", METHOD: json.dumps(values, sort_keys=True)}


def read_described(files: Sequence[Path]) -> tuple[Description, dict[str, Tensor], str]:
    """The description and the tensors of a checkpoint's safetensors files, checked against each other.

    Returns:
        also the hash that ``config.json`` should have.

    Raises:
        CheckpointError: a file that is missing, broken or changed, or a number that is not finite.
    """
    tensors: dict[str, Tensor] = {}
    headers = set()
    for path in files:
        header, found = _read_file(path)
        headers.add(header)
        tensors |= found
    path = files[0]
    if len(headers) > 1:
        raise CheckpointError(f"{path.parent}: its {len(files)} safetensors files were not written together: their headers differ")
    values = _checked(path, *headers)
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds {int((~x.isfinite()).sum())} values that are not finite")
    if (found_sha := tensors_sha256(tensors)) != values["sha256"].get("tensors"):
        raise CheckpointError(
            f"{path}: sha256 of its tensors is {found_sha}; its header expects {values['sha256'].get('tensors')}. "
            "The file was changed or damaged"
        )
    description = Description(values["architecture"], values["quantizers"], values["tied"])
    return description, tensors, str(values["sha256"].get("config.json"))


def _read_file(path: Path) -> tuple[str, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expected {WRITTEN_BY}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it has no iterator
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}). Nothing in it was executed; fetch or write it again"
        ) from error
    if set(metadata) != {"format", METHOD} or metadata["format"] != "pt":
        raise CheckpointError(f"{path}: its header has {sorted(metadata) or 'no metadata'}; expected format and {METHOD}: {WRITTEN_BY}")
    return metadata[METHOD], tensors


def _checked(path: Path, header: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(header)
    except ValueError as error:
        raise CheckpointError(f"{path}: {METHOD} in its header is not readable as JSON ({error})") from error
    missing = set(FIELDS) - set(values) if isinstance(values, dict) else set(FIELDS)
    if missing:
        raise CheckpointError(f"{path}: {METHOD}: expected an object with {', '.join(FIELDS)}; missing {', '.join(sorted(missing))}")
    for name, kind in FIELDS.items():
        if not isinstance(values[name], kind):
            expected = "an object" if kind is dict else kind.__name__
            raise CheckpointError(f"{path}: {METHOD}.{name} {values[name]!r}; expected {expected}")
    if values["format"] != FORMAT:
        raise CheckpointError(f"{path}: {METHOD}.format {values['format']!r}; this version reads format {FORMAT}")
    hashes = dict(values["sha256"])
    own = hashes.pop("description", None)
    if own != json_sha256(values | {"sha256": hashes}):
        raise CheckpointError(f"{path}: {METHOD}: its contents do not match its own sha256. The file was changed or damaged")
    return values


# ---- hashes ----


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and bytes, whichever order or file they are in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(x.shape), str(x.dtype)]).encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_sha256(values: Mapping[str, Any]) -> str:
    """Of what a JSON object says, whichever way it is spelled."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
