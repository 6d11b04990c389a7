"""Simulation: a model, its graph, and the quantizers in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Self

import transformers  # its models are looked up when there is one: importing quantsim need not wait for them
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from quantsim.config import ConfigError, QuantConfig
from quantsim.formats.aimet_config import is_aimet_config, read_aimet_config
from quantsim.formats.description import METHOD
from quantsim.graph.forward import GraphForward, refuse_pickle, run_on_graph
from quantsim.graph.place import Placement, place
from quantsim.graph.trace import trace
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State
from quantsim.report.coverage import coverage_table, summary
from quantsim.rewrites.clamp_mask import clamp_mask
from quantsim.rewrites.exact_ops import exact_ops
from quantsim.rewrites.insert_quantizers import ROOM, insert_quantizers
from quantsim.rewrites.scale_channels import unscale_reads

PLUGIN = "quantsim.hf"  # stands above, and is found through transformers' registry of quantization methods
Batch = Mapping[str, Tensor]
Data = Iterable[Batch] | Callable[..., Any]


class Simulation:
    """What :class:`quantsim.QuantSim` is made of, where its arguments and attributes are explained."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig | str | Path | None = None,
        example_inputs: Batch | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        if isinstance(model.__dict__.get("forward"), GraphForward):
            raise ValueError(f"{type(model).__name__} is a simulation already; give QuantSim the model that it was made from")
        self.config = resolve_config(config)
        self.model = model if in_place else copy.deepcopy(model)
        if example_inputs is not None:  # a training batch will do: labels are not traced
            labels = find_labels(type(model))  # type: ignore[no-untyped-call]
            example_inputs = {name: x for name, x in example_inputs.items() if name not in labels}
        self.graph = trace(self.model, example_inputs)
        if self.config.mask_clamp is not None:
            clamp_mask(self.graph, self.config.mask_clamp)
        if self.config.post_training.smooth is not None:
            unscale_reads(self.graph)
        self.placements: list[Placement] = place(self.graph, self.config)
        insert_quantizers(self.graph, self.placements, self.model.training)
        exact_ops(self.graph, self.model.training)
        run_on_graph(self.model, self.graph)
        if isinstance(self.model, transformers.PreTrainedModel):
            import_module(PLUGIN)
            registry: Any = transformers.quantizers
            registry.AutoHfQuantizer.from_config({"quant_method": METHOD, "config": self.config.to_dict()}).attach(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent copy without another trace; of its model alone, ``copy.deepcopy(sim.model)`` makes one too."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.config, new.model, new.graph = self.config, copy.deepcopy(self.model, memo), copy.deepcopy(self.graph, memo)
        nodes = {node.name: node for node in new.graph.graph.nodes}
        new.placements = [replace(p, node=nodes[p.node.name]) for p in self.placements]
        return new

    def __reduce__(self) -> NoReturn:
        refuse_pickle(self.model)

    # ---- quantizers ----

    @property
    def quantizers(self) -> dict[str, FakeQuantizer]:
        """Every quantizer by its placement's name, in the order of the graph."""
        found = (
            {q.name: q for q in self.model.get_submodule(ROOM).modules() if isinstance(q, FakeQuantizer)} if self._has_quantizers else {}
        )
        return {p.name: found[p.name] for p in self.placements if p.spec}

    @property
    def _has_quantizers(self) -> bool:
        return any(p.spec for p in self.placements)

    @contextmanager
    def quantizers_off(self) -> Iterator[None]:
        """Run in floating point inside the ``with`` block (a clamped mask stays clamped)."""
        states = {q: q.state for q in self.quantizers.values()}
        try:
            for quantizer in states:
                quantizer.state = State.OFF
            yield
        finally:
            for quantizer, state in states.items():
                quantizer.state = state

    def freeze_ranges(self) -> None:
        """Stop range learning: every calibrated quantizer keeps its present range."""
        for quantizer in self.quantizers.values():
            if quantizer.calibrated:
                quantizer.state = State.FIXED

    def range_parameters(self) -> list[nn.Parameter]:
        """The ranges that are being learned, for an optimizer group of their own."""
        return [p for q in self.quantizers.values() if q.state is State.LEARNING for p in (q.min, q.max)]

    def __repr__(self) -> str:
        return f"QuantSim({type(self.model).__name__}, {self.config.name}: {summary(self.placements)})"

    def __str__(self) -> str:
        return coverage_table(self.graph, self.placements, self.quantizers)


def resolve_config(config: QuantConfig | str | Path | None) -> QuantConfig:
    """A config from itself, a preset's name, or the path of a JSON file in our form or in AIMET's."""
    if config is None:
        return QuantConfig.preset("aimet")
    if isinstance(config, QuantConfig):
        return config
    if isinstance(config, str) and config in QuantConfig.presets():
        return QuantConfig.preset(config)
    if str(config).endswith(".json") or Path(config).is_file():
        return read_aimet_config(config) if is_aimet_config(config) else QuantConfig.from_json(config)
    if isinstance(config, Path):
        raise ConfigError(f"{config}: no such file")
    return QuantConfig.preset(config)
