"""QuantSimConfig: how ``from_pretrained`` quantizes, and what ``config.json`` keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers.quantizers import register_quantization_config  # type: ignore[attr-defined]
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantsim.config import ConfigError, QuantConfig
from quantsim.formats.description import METHOD
from quantsim.sim import Batch, Data, resolve_config


@register_quantization_config(METHOD)
class QuantSimConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a simulation.

    Args:
        preset: a preset's name, a :class:`QuantConfig`, or the path of a JSON file (ours or AIMET's).
        calibration: what ``QuantSim.compute_encodings`` takes: batches by keyword, a ``DataLoader``, or a callable that is given
            the model. Without it the model is placed and not calibrated, and computes in floating point.
        example_inputs: a batch by keyword to trace with; made from the model's config by default.
        config: the same as ``preset``, as JSON; it is what ``config.json`` holds.

    Raises:
        ConfigError: the config means nothing, or both ``preset`` and ``config`` are given.

    Data and inputs are used once, while the model is loaded, and are not saved.

    >>> QuantSimConfig(preset="deploy").config.name
    'deploy'
    """

    def __init__(
        self,
        preset: QuantConfig | str | Path | None = None,
        calibration: Data | None = None,
        example_inputs: Batch | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown or quant_method != METHOD:
            wrong = ", ".join(unknown) or f"quant_method {quant_method!r}"
            raise ConfigError(f"quantization_config: {wrong}; expected quant_method {METHOD!r} and config, no more")
        if config is not None and preset is not None:
            raise ConfigError("QuantSimConfig: preset and config are two ways to say one thing; give one of them")
        self.quant_method = METHOD  # type: ignore[assignment]  # a method of our own, not in transformers' enum
        self.config = resolve_config(preset) if config is None else QuantConfig.from_dict(config)
        self.calibration = calibration
        self.example_inputs: Mapping[str, Tensor] | None = example_inputs

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "config": self.config.to_dict()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Data stays what it is: a loader or generator can't be copied, and ``from_pretrained`` copies configs."""
        new = type(self)(self.config, self.calibration, self.example_inputs)
        memo[id(self)] = new
        return new
