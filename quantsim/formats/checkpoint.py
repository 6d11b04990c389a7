"""Checkpoints in the layout of ``transformers``: a folder of safetensors and JSON, checked field by field when read, never a pickle.

``config.json`` is the model's own, with the quantization config as its ``quantization_config``; ``model.safetensors`` holds weights,
quantizers (``quantizers.<name>.min``, ``.max``, ``.state_code``, and of groups ``.group_of``) and the scales of smoothed streams
(``scales.<name>.scale``), and in its header what each quantizer is and the hashes of all of it (:mod:`quantsim.formats.description`).
``transformers`` writes and reads the same files (:mod:`quantsim.hf`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantsim.config import ConfigError, QuantConfig, QuantSpec
from quantsim.formats.description import METHOD, WRITTEN_BY, CheckpointError, Description, file_sha256, json_sha256, read_described
from quantsim.graph.roles import UNSCALE
from quantsim.numerics.affine import affine_params, dequantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State

__all__ = ["Checkpoint", "CheckpointError", "contents", "file_sha256", "is_checkpoint", "plain_state", "read_checkpoint", "save_checkpoint"]

WEIGHTS, MODEL_CONFIG, CARD = "model.safetensors", "config.json", "README.md"
RANGES = "quantizers."
ADDED = (RANGES, UNSCALE)
"""What a simulation adds to the model's tensors."""


# ---- write ----


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    config: QuantConfig,
    quantizers: Mapping[str, FakeQuantizer],
    state: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    card: str | None = None,
) -> None:
    """Write a checkpoint. Files appear in ``folder`` only when all of them are complete.

    Args:
        state: the model's tensors, in place of those that it holds; a quantized weight may be its integers.
        tokenizer: written beside, by its own ``save_pretrained``.
        card: the text of ``README.md``.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; expected a folder to write to")
    tensors, metadata = contents(model, config, quantizers, state)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        safetensors.torch.save_file(tensors, staging / WEIGHTS, metadata=metadata)
        (staging / WEIGHTS).chmod(0o644)  # safetensors writes files that their owner alone may read
        _write_text(staging / MODEL_CONFIG, json.dumps(model_config(model, config), indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if card is not None:
            _write_text(staging / CARD, card)
        for path in staging.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def contents(
    model: nn.Module, config: QuantConfig, quantizers: Mapping[str, FakeQuantizer], state: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of ``model.safetensors``; see :func:`save_checkpoint`."""
    tensors, tied = _untied((plain_state(model) if state is None else dict(state)) | _ranges(quantizers) | _scales(model))
    specs = {name: q.spec.to_dict() for name, q in quantizers.items()}
    return tensors, Description(type(model).__name__, specs, tied).sealed(tensors, model_config(model, config))


def model_config(model: nn.Module, config: QuantConfig) -> dict[str, Any]:
    """What ``config.json`` says. The model's class and dtype are noted in its config, as ``transformers`` does when it saves."""
    own = getattr(model, "config", None)
    values: dict[str, Any] = {}
    if own is not None:
        own.architectures = [type(model).__name__]
        own.dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
        values = json.loads(own.to_json_string())
    return values | {"quantization_config": {"quant_method": METHOD, "config": json.loads(json.dumps(config.to_dict()))}}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names that the model's class knows: computed ones as their values, nothing that a simulation adds."""
    state = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith(ADDED) and ".parametrizations." not in k}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                state[f"{path}.{name}"] = getattr(module, name).detach()
    return state


def _ranges(quantizers: Mapping[str, FakeQuantizer]) -> dict[str, Tensor]:
    return {f"{RANGES}{name}.{part}": x for name, q in quantizers.items() for part, x in _parts(q).items()}


def _parts(quantizer: FakeQuantizer) -> dict[str, Tensor]:
    return quantizer.range_tensors() | {"state_code": quantizer.state_code}


def _scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_buffers() if name.startswith(UNSCALE)}


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


# ---- read ----


@dataclass(frozen=True)
class Checkpoint:
    """What was read: tensors and what they are, checked against each other; for a model to take.

    Attributes:
        path: of the weights, for messages.
        values: of ``config.json``.
        config: of the quantization.
    """

    path: Path
    values: Mapping[str, Any]
    config: QuantConfig
    description: Description
    tensors: Mapping[str, Tensor]

    def build(self, model: nn.Module | None = None) -> nn.Module:
        """The model in floating point, in eval mode: a new one of its class in ``transformers``, or ``model`` with its weights replaced.

        Raises:
            CheckpointError: no such class, a config that builds none, tensors that are not the model's.
        """
        if model is None:
            model = _build_model(self.path, self.description.architecture, self.values)
        weights = self.weights_for(model)
        expected = plain_state(model)
        for name, x in weights.items():
            if x.dtype != expected[name].dtype:
                raise CheckpointError(f"{self.path}: {name} is {list(x.shape)} of {x.dtype}; expected {expected[name].dtype}")
        model.load_state_dict(weights)
        return model.eval()

    def weights_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Every tensor of the model by name, integers as the values that they stand for. The model may be on the meta device.

        Raises:
            CheckpointError: a name that only one side has, another shape, integers that are not their quantizer's.
        """
        every = dict(self.tensors) | {a: self.tensors[n] for a, n in self.description.tied.items() if str(n) in self.tensors}
        weights = {name: x for name, x in every.items() if not name.startswith(ADDED)}
        expected = plain_state(model)
        _same_names(self.path, "tensors", weights, expected)
        for name, x in weights.items():
            if x.dtype in (torch.int8, torch.uint8) and expected[name].is_floating_point():
                weights[name] = x = self._from_integers(str(self.description.tied.get(name, name)), x)
            if x.shape != expected[name].shape or x.is_floating_point() != expected[name].is_floating_point():
                wanted = f"{list(expected[name].shape)} of {expected[name].dtype}"
                raise CheckpointError(f"{self.path}: {name} is {list(x.shape)} of {x.dtype}; expected {wanted}")
        return weights

    def integers(self) -> set[str]:
        """The names of weights that are stored as integers."""
        stored = {name for name, x in self.tensors.items() if not name.startswith(ADDED) and x.dtype in (torch.int8, torch.uint8)}
        return stored | {alias for alias, name in self.description.tied.items() if name in stored}

    def _from_integers(self, name: str, q: Tensor) -> Tensor:
        """The values of a weight that was written as integers."""
        low, high = (self.tensors.get(f"{RANGES}{name}.{end}") for end in ("min", "max"))
        try:
            spec = QuantSpec.from_dict(self.description.quantizers[name])
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{self.path}: quantizers.{name}: needed to read {name}, which is {q.dtype} ({error!r})") from error
        stored = torch.int8 if spec.symmetric else torch.uint8
        if q.dtype is not stored or q.numel() == 0 or not spec.quant_min <= int(q.min()) <= int(q.max()) <= spec.quant_max:
            raise CheckpointError(
                f"{self.path}: {name} is {q.dtype}; expected {stored} from {spec.quant_min} to {spec.quant_max}, for it is {spec}"
            )
        if spec.axis is not None and not -q.ndim <= spec.axis < q.ndim:
            raise CheckpointError(f"{self.path}: quantizers.{name}.axis is {spec.axis}; {name} has {q.ndim} axes")
        sizes = [] if spec.axis is None else [q.shape[spec.axis]]
        if low is None or high is None or not list(low.shape) == list(high.shape) == sizes:
            raise CheckpointError(f"{self.path}: {name} is {q.dtype}; expected {RANGES}{name}.min and .max of shape {sizes} with it")
        return dequantize(q, affine_params(low, high, spec))

    def load_added(self, model: nn.Module, quantizers: Mapping[str, FakeQuantizer]) -> None:
        """Give a simulation what it adds to its model: every quantizer's range and state, and the scales of smoothed streams.

        Raises:
            CheckpointError: a quantizer or scale that only one side has, another spec, a tensor of another shape, a state or a group
                that there isn't.
        """
        _same_names(self.path, "quantizers", self.description.quantizers, quantizers)
        _same_names(self.path, "ranges", self._under(RANGES), _ranges(quantizers))
        _same_names(self.path, "scales", self._under(UNSCALE), scales := _scales(model))
        for name, scale in scales.items():
            scale.copy_(self._like(name, scale))
        for name, quantizer in quantizers.items():
            spec = self.description.quantizers[name]
            if spec != (expected := quantizer.spec.to_dict()):
                raise CheckpointError(f"{self.path}: quantizers.{name} is {spec}; this model and config give {expected}")
            tensors = {part: self._like(f"{RANGES}{name}.{part}", own) for part, own in _parts(quantizer).items()}
            code = int(tensors["state_code"])
            if code not in {state.value for state in State}:
                known = ", ".join(f"{state.value} ({state.name.lower()})" for state in State)
                raise CheckpointError(f"{self.path}: {RANGES}{name}.state_code is {code}; expected one of {known}")
            if (group_of := tensors.get("group_of")) is not None:
                first, last, groups = int(group_of.min()), int(group_of.max()), len(tensors["min"])
                if not 0 <= first <= last < groups:
                    raise CheckpointError(f"{self.path}: {RANGES}{name}.group_of is from {first} to {last}; expected 0 to {groups - 1}")
            quantizer.restore(State(code), tensors)

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {name: x for name, x in self.tensors.items() if name.startswith(prefix)}

    def _like(self, name: str, expected: Tensor) -> Tensor:
        x = self.tensors[name]
        if x.shape != expected.shape or x.dtype != expected.dtype:
            raise CheckpointError(
                f"{self.path}: {name} is {list(x.shape)} of {x.dtype}; expected {list(expected.shape)} of {expected.dtype}"
            )
        return x


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's ``config.json`` says that a simulation was saved there."""
    try:
        return bool(_quant_method(json.loads((folder / MODEL_CONFIG).read_text())) == METHOD)
    except (OSError, ValueError):
        return False


def read_checkpoint(folder: str | Path, files: Sequence[str | Path] = ()) -> Checkpoint:
    """Read and check a checkpoint; nothing in it is executed.

    Args:
        files: the files that hold the weights; by default ``model.safetensors`` or its parts.

    Raises:
        CheckpointError: a file that is missing, broken, changed, or of another kind.
    """
    folder = Path(folder)
    path = folder / MODEL_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expected a folder with {WRITTEN_BY}")
    weights = [Path(file) for file in files] or sorted(folder.glob("model-*-of-*.safetensors"))
    if not files and ((folder / WEIGHTS).exists() or not weights):
        weights = [folder / WEIGHTS]
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    method = _quant_method(values)
    if method != METHOD:
        raise CheckpointError(f"{path}: quantization_config.quant_method is {method!r}; expected {METHOD!r}: {WRITTEN_BY}")
    description, tensors, expected = read_described(weights)
    if (found := json_sha256(values)) != expected:
        raise CheckpointError(
            f"{path}: sha256 of what it says is {found}; {weights[0].name} expects {expected}. The file was changed or damaged "
            "(to change it: load the model, change model.config, save it)"
        )
    try:
        config = QuantConfig.from_dict(values["quantization_config"]["config"])
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: quantization_config.config: {error}") from error
    return Checkpoint(weights[0], values, config, description, tensors)


def _quant_method(values: Any) -> Any:
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _build_model(path: Path, architecture: str, values: Mapping[str, Any]) -> nn.Module:
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class):
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is no model class of transformers; pass model= with an instance of it"
        )
    path, config_class = path.parent / MODEL_CONFIG, cls.config_class  # not AutoConfig, which may run code that the file names
    try:
        if values["model_type"] != config_class.model_type:
            raise CheckpointError(f"{path}: model_type is {values['model_type']!r}; {architecture} has {config_class.model_type!r}")
        own = {name: value for name, value in values.items() if name != "quantization_config"}
        with torch.random.fork_rng(devices=[]):  # initial values are replaced; the caller's random state stays
            model: nn.Module = cls(config_class.from_dict(own))
        dtype = getattr(torch, str(own.get("dtype")), None)
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model raises on sizes that mean nothing
        raise CheckpointError(f"{path}: no {architecture} can be built from it ({type(error).__name__}: {error})") from error


def _same_names(path: Path, what: str, saved: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(needed) - set(saved)), sorted(set(saved) - set(needed))
    if missing or extra:
        counts = f"missing {missing[:3] or 'none'} ({len(missing)}), unknown {extra[:3] or 'none'} ({len(extra)})"
        raise CheckpointError(f"{path}: {what} do not fit the model; {counts}")
