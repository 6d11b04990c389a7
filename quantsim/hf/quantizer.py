"""The ``HfQuantizer`` of ``quant_method: "quantsim"``: between ``from_pretrained``, ``save_pretrained`` and :class:`QuantSim`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer  # type: ignore[attr-defined]

from quantsim.formats.checkpoint import Checkpoint, contents, read_checkpoint
from quantsim.formats.description import METHOD, CheckpointError
from quantsim.graph.forward import run_on_itself
from quantsim.hf.config import QuantSimConfig
from quantsim.rewrites.scale_channels import unfold
from quantsim.sim import QuantSim

OURS = ("save_pretrained", "activation_checkpointing_enable", "gradient_checkpointing_enable", "supports_gradient_checkpointing")


@register_quantizer(METHOD)
class QuantSimQuantizer(HfQuantizer):
    """What ``transformers`` calls while it loads, trains and saves a simulated model.

    A checkpoint is read and checked whole before any of it is taken; a model that is quantized on load is traced, placed and
    calibrated when its weights are there.

    Attributes:
        sim: of the model that has this as its ``hf_quantizer``.
    """

    quantization_config: QuantSimConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True
    sim: QuantSim
    _checkpoint: tuple[Checkpoint, Mapping[str, Tensor]]

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if isinstance(device_map, str) or len(places) > 1 or "disk" in places:
            raise ValueError(f"device_map {device_map!r}: a simulated model is one graph on one device; expected one, as {{'': 'cpu'}}")

    def attach(self, sim: QuantSim) -> None:
        """Let ``transformers`` know ``sim.model`` as quantized: what it saves, in a Trainer's checkpoints too, has the ranges then."""
        self.sim = sim
        model: Any = sim.model
        model.hf_quantizer, model.is_quantized, model.quantization_method = self, True, METHOD
        model.save_pretrained = partial(_save_pretrained, model)
        model.supports_gradient_checkpointing = False
        refuse = partial(_refuse_checkpointing, type(model).__name__)
        model.activation_checkpointing_enable = model.gradient_checkpointing_enable = refuse

    # ---- load ----

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointError(f"{type(model).__name__}: its config says that it is quantized; expected a checkpoint, not a state_dict")
        checkpoint = read_checkpoint(Path(checkpoint_files[0]).parent, checkpoint_files)
        architecture = checkpoint.description.architecture
        if type(model).__name__ != architecture:
            raise CheckpointError(
                f"{checkpoint.path}: holds a {architecture} with its quantizers, and no {type(model).__name__}; load it with "
                f"{architecture}, or with the Auto class of its task"
            )
        weights, stored = checkpoint.weights_for(model), checkpoint.integers()
        self._checkpoint = checkpoint, {name: x for name, x in weights.items() if name in stored}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"^quantizers\.", r"^scales\."}  # taken when the graph has them

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            checkpoint, values = self.__dict__.pop("_checkpoint")
            _put(model, values)
            sim = QuantSim(model, checkpoint.config, self.quantization_config.example_inputs, in_place=True)
            checkpoint.load_added(sim.model, sim.quantizers)
        else:
            given = self.quantization_config
            sim = QuantSim(model, given.config, given.example_inputs, in_place=True)
            model.config.quantization_config = QuantSimConfig(sim.config)  # without the data
            if given.calibration is not None:
                sim.compute_encodings(given.calibration)
            else:
                warnings.warn(
                    f"{type(model).__name__} is not calibrated and computes in floating point: give QuantSimConfig calibration=, or "
                    "call quantsim.hf.simulation_of(model).compute_encodings",
                    stacklevel=2,
                )

    # ---- save ----

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return contents(model, self.quantization_config.config, self.sim.quantizers)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model that was simulated, with the weights that it has now and no quantizers."""
        unfold(self.sim.graph)
        run_on_itself(model)
        for name in OURS:
            model.__dict__.pop(name)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def simulation_of(model: nn.Module) -> QuantSim:
    """The :class:`QuantSim` of a model that ``from_pretrained`` gave: to calibrate, lower, export or print it.

    Raises:
        ValueError: the model isn't simulated.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QuantSimQuantizer):
        raise ValueError(f"{type(model).__name__} is no simulated model: its hf_quantizer is {quantizer!r}")
    return quantizer.sim


def _save_pretrained(model: Any, *args: Any, **settings: Any) -> Any:
    """The class's ``save_pretrained``, with the quantization in the model's config while that is written (configs are shared).

    Tensors have the model's own names, not those of the checkpoint that it came from (``LayerNorm.gamma``).
    """
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    try:
        return type(model).save_pretrained(model, *args, **{"save_original_format": False, **settings})
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def _put(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Make these the model's parameters, where ``transformers`` took the integers that they are stored as."""
    if not values:
        return
    like = next(p for p in model.parameters() if p.is_floating_point())
    for name, x in values.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(x.to(like)))
    model.tie_weights()


def _refuse_checkpointing(name: str, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"{name}: gradient checkpointing is off in a simulated model: its forward is one traced graph, without the layers' own forwards "
        "that would be computed twice. Leave gradient_checkpointing out"
    )
