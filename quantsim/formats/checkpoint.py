"""Checkpoints: a folder of safetensors and JSON, checked field by field when read, never a pickle.

``config.json`` is the model's own, ``model.safetensors`` holds weights and ranges (``quantizers.<name>.min`` / ``.max``),
``quantsim.json`` the quantization config, what each quantizer is, and the hashes of all of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantsim.config import ConfigError, QuantConfig, QuantSpec
from quantsim.numerics.affine import affine_params, dequantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State

WEIGHTS, MODEL_CONFIG, SIM = "model.safetensors", "config.json", "quantsim.json"
FORMAT = 1
RANGES = "quantizers."
FIELDS = {"format": int, "architecture": str, "config": dict, "quantizers": dict, "tied": dict, "versions": dict, "sha256": dict}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is: the message names the file, the field, and what was expected."""


@dataclass
class Checkpoint:
    """What was read: the model with its weights, the config, and the ranges to come."""

    path: Path
    model: nn.Module
    config: QuantConfig
    quantizers: Mapping[str, Any]
    ranges: Mapping[str, Tensor]

    def load_ranges(self, quantizers: Mapping[str, FakeQuantizer]) -> None:
        """Give every quantizer of a simulation its range and state.

        Raises:
            CheckpointError: a quantizer that only one side has, another spec, a range of another shape.
        """
        _same_names(self.path / SIM, "quantizers", self.quantizers, quantizers)
        _same_names(self.path / WEIGHTS, "ranges", self.ranges, _ranges(quantizers))
        for name, quantizer in quantizers.items():
            saved = self.quantizers[name]
            spec, state = (saved.get(field) if isinstance(saved, dict) else None for field in ("spec", "state"))
            if spec != asdict(quantizer.spec):
                raise CheckpointError(
                    f"{self.path / SIM}: quantizers.{name}.spec is {spec}; this model and config give {asdict(quantizer.spec)}"
                )
            states = {member.name.lower(): member for member in State}
            if state not in states:
                raise CheckpointError(f"{self.path / SIM}: quantizers.{name}.state is {state!r}; expected one of {', '.join(states)}")
            ends = []
            for end in ("min", "max"):
                key = f"{RANGES}{name}.{end}"
                ends.append(self.ranges[key])
                _same_kind(self.path / WEIGHTS, key, ends[-1], getattr(quantizer, end))
            quantizer.restore(states[state], *ends)


# ---- write ----


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    config: QuantConfig,
    quantizers: Mapping[str, FakeQuantizer],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint. Files appear in ``folder`` only when all of them are complete.

    Args:
        state: the model's tensors, in place of those that it holds; a quantized weight may be its integers.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; expected a folder to write to")
    tensors, tied = _untied((plain_state(model) if state is None else dict(state)) | _ranges(quantizers))
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        safetensors.torch.save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / WEIGHTS).chmod(0o644)  # safetensors writes files that their owner alone may read
        _write_model_config(model, staging)
        description: dict[str, Any] = {
            "format": FORMAT,
            "architecture": type(model).__name__,
            "config": config.to_dict(),
            "quantizers": {name: {"spec": asdict(q.spec), "state": q.state.name.lower()} for name, q in quantizers.items()},
            "tied": tied,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "sha256": {name: file_sha256(staging / name) for name in (WEIGHTS, MODEL_CONFIG)},
        }
        description["sha256"] = {**description["sha256"], SIM: _own_sha256(description)}
        (staging / SIM).write_text(json.dumps(description, indent=1) + "\n")
        for name in (WEIGHTS, MODEL_CONFIG, SIM):
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names that the model's class knows: computed ones as their values, no quantizers."""
    state = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith(RANGES) and ".parametrizations." not in k}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                state[f"{path}.{name}"] = getattr(module, name).detach()
    return state


def _ranges(quantizers: Mapping[str, FakeQuantizer]) -> dict[str, Tensor]:
    return {f"{RANGES}{name}.{end}": getattr(q, end).detach() for name, q in quantizers.items() for end in ("min", "max")}


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, and which name stands for which: ``{alias: name}``."""
    first: dict[tuple[Any, ...], str] = {}
    tensors, tied = {}, {}
    for name, x in state.items():
        key = (x.data_ptr(), tuple(x.shape), x.dtype) if x.numel() else (name,)
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = x.contiguous().cpu()
    return tensors, tied


def _write_model_config(model: nn.Module, folder: Path) -> None:
    config = getattr(model, "config", None)
    if config is None:
        (folder / MODEL_CONFIG).write_text("{}\n")
        return
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(description: Mapping[str, Any]) -> str:
    """The hash of ``quantsim.json`` itself, without this hash."""
    rest = {**description, "sha256": {name: value for name, value in description["sha256"].items() if name != SIM}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- read ----


def load_checkpoint(folder: str | Path, model: nn.Module | None = None) -> Checkpoint:
    """Read and check a checkpoint; see ``QuantSim.from_pretrained``."""
    folder = Path(folder)
    description = _read_description(folder)
    for name in (WEIGHTS, MODEL_CONFIG):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; expected a folder written by QuantSim.save_pretrained")
    tensors = _read_tensors(folder / WEIGHTS)
    for name in (WEIGHTS, MODEL_CONFIG):
        if (found := file_sha256(folder / name)) != description["sha256"].get(name):
            raise CheckpointError(
                f"{folder / name}: sha256 is {found}; {SIM} expects {description['sha256'].get(name)}. The file was changed or damaged"
            )
    try:
        config = QuantConfig.from_dict(description["config"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / SIM}: config: {error}") from error
    tensors |= {alias: tensors[name] for alias, name in description["tied"].items() if str(name) in tensors}
    if model is None:
        model = _build_model(folder, description["architecture"])
    weights = {name: x for name, x in tensors.items() if not name.startswith(RANGES)}
    expected = plain_state(model)
    _same_names(folder / WEIGHTS, "tensors", weights, expected)
    ranges = {name: x for name, x in tensors.items() if name.startswith(RANGES)}
    for name, x in weights.items():
        if x.dtype in (torch.int8, torch.uint8) and expected[name].is_floating_point():
            quantizer = str(description["tied"].get(name, name))
            weights[name] = x = _from_integers(folder, quantizer, x, description["quantizers"], ranges).to(expected[name].dtype)
        _same_kind(folder / WEIGHTS, name, x, expected[name])
    model.load_state_dict(weights)
    return Checkpoint(folder, model.eval(), config, description["quantizers"], ranges)


def _from_integers(folder: Path, name: str, q: Tensor, quantizers: Mapping[str, Any], ranges: Mapping[str, Tensor]) -> Tensor:
    """The values of a weight that was written as integers."""
    low, high = (ranges.get(f"{RANGES}{name}.{end}") for end in ("min", "max"))
    try:
        spec = QuantSpec.from_dict(quantizers[name]["spec"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / SIM}: quantizers.{name}.spec: needed to read {name}, which is {q.dtype} ({error!r})") from error
    stored = torch.int8 if spec.symmetric else torch.uint8
    if q.dtype is not stored or q.numel() == 0 or not spec.quant_min <= int(q.min()) <= int(q.max()) <= spec.quant_max:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {name} is {q.dtype}; expected {stored} from {spec.quant_min} to {spec.quant_max}, for it is {spec}"
        )
    if spec.axis is not None and not -q.ndim <= spec.axis < q.ndim:
        raise CheckpointError(f"{folder / SIM}: quantizers.{name}.spec.axis is {spec.axis}; {name} has {q.ndim} axes")
    sizes = [] if spec.axis is None else [q.shape[spec.axis]]
    if low is None or high is None or not list(low.shape) == list(high.shape) == sizes:
        raise CheckpointError(f"{folder / WEIGHTS}: {name} is {q.dtype}; expected {RANGES}{name}.min and .max of shape {sizes} with it")
    return dequantize(q, affine_params(low, high, spec))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / SIM
    try:
        description: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; expected a folder written by QuantSim.save_pretrained") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    missing = set(FIELDS) - set(description) if isinstance(description, dict) else set(FIELDS)
    if missing:
        raise CheckpointError(f"{path}: expected an object with {', '.join(FIELDS)}; missing {', '.join(sorted(missing))}")
    for name, kind in FIELDS.items():
        if not isinstance(description[name], kind):
            raise CheckpointError(f"{path}: {name} {description[name]!r}; expected {'an object' if kind is dict else kind.__name__}")
    if description["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {description['format']!r}; this version reads format {FORMAT}")
    if description["sha256"].get(SIM) != _own_sha256(description):
        raise CheckpointError(f"{path}: its contents do not match its own sha256. The file was changed or damaged")
    return description


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}). Nothing in it was executed; fetch or write it again"
        ) from error
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds {int((~x.isfinite()).sum())} values that are not finite")
    return tensors


def _build_model(folder: Path, architecture: str) -> nn.Module:
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class):
        raise CheckpointError(
            f"{folder / SIM}: architecture {architecture!r} is no model class of transformers; pass model= with an instance of it"
        )
    path, config_class = folder / MODEL_CONFIG, cls.config_class  # not AutoConfig, which may run code that the file names
    try:
        values = json.loads(path.read_text())
        if values["model_type"] != config_class.model_type:
            raise CheckpointError(f"{path}: model_type is {values['model_type']!r}; {architecture} has {config_class.model_type!r}")
        with torch.random.fork_rng(devices=[]):  # initial values are replaced; the caller's random state stays
            return cls(config_class.from_dict(values))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model raises on sizes that mean nothing
        raise CheckpointError(f"{path}: no {architecture} can be built from it ({type(error).__name__}: {error})") from error


def _same_kind(path: Path, name: str, x: Tensor, expected: Tensor) -> None:
    if x.shape != expected.shape or x.dtype != expected.dtype:
        raise CheckpointError(f"{path}: {name} is {list(x.shape)} of {x.dtype}; expected {list(expected.shape)} of {expected.dtype}")


def _same_names(path: Path, what: str, saved: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(needed) - set(saved)), sorted(set(saved) - set(needed))
    if missing or extra:
        counts = f"missing {missing[:3] or 'none'} ({len(missing)}), unknown {extra[:3] or 'none'} ({len(extra)})"
        raise CheckpointError(f"{path}: {what} do not fit the model; {counts}")
