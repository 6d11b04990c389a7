"""LoweredModel: a simulation on the integers that it simulates, for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantsim.config import QuantConfig
from quantsim.formats.checkpoint import plain_state, save_checkpoint
from quantsim.graph.forward import GraphForward
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.kernels.integer_rows import missing_for_rows
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.report.integers import integer_table
from quantsim.report.lowering import lowering_table, stored_bytes
from quantsim.rewrites.integer_only.rows import in_rows
from quantsim.rewrites.lower_int8 import LoweringError
from quantsim.rewrites.lower_int8.weights import ROOM, ROWS


class LoweredModel:
    """What :meth:`QuantSim.lower` gives.

    Attributes:
        model: an instance of the simulated model's class that takes and gives what that does, for inference alone. It holds
            int8 weights and no FP32 copy of them.
        graph: what its forward runs.
        fallback: why products are computed in float32 on this machine; empty where they run on integer kernels.

    ``print(lowered)`` is a table: which kernel computes each edge, and why some have none of integers.
    """

    def __init__(
        self, model: nn.Module, graph: fx.GraphModule, config: QuantConfig, quantizers: Mapping[str, FakeQuantizer], fallback: str
    ) -> None:
        self.graph, self.config, self.fallback = graph, config, fallback
        self._quantizers = {name: copy.deepcopy(quantizer) for name, quantizer in quantizers.items()}
        self._state = _compact_state(model, graph)
        self.model = _shell(model, graph)

    def compile(self, backend: str = "inductor") -> LoweredModel:
        """Let ``torch.compile`` fuse what is between the products; returns the same object.

        Compiled at the first call, once for all batch sizes and lengths (and once more for a batch of one row); that takes minutes
        for a large model and needs a C++ compiler. Weights become constants of the compiled code ("freezing").
        """
        self.model.__dict__["forward"].graph = compiled(self.graph, backend)
        return self

    @property
    def bytes(self) -> int:
        """The memory that weights and constants take."""
        return stored_bytes(self.graph)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint whose quantized weights are int8: about a quarter of the FP32 model's size.

        It has the form that :meth:`QuantSim.save_pretrained` writes; :meth:`QuantSim.from_pretrained` reads it too, with weights on
        their grid.
        """
        values = {tensor: tensor() for tensor in set(self._state.values())}
        names = sorted(self._state, key=lambda name: name not in self._quantizers)  # tied weights are kept by their quantizer's name
        state = {name: values[self._state[name]] for name in names}
        save_checkpoint(folder, self.model, self.config, self._quantizers, state)

    def __repr__(self) -> str:
        return f"LoweredModel({type(self.model).__name__}, {self.config.name}: {self.bytes / 1e6:.1f} MB)"

    def __str__(self) -> str:
        note = f"\nproducts are computed in float32: {self.fallback}" if self.fallback else ""
        return lowering_table(self.graph) + note


class IntegerModel(LoweredModel):
    """What :meth:`QuantSim.integer_only` gives: a :class:`LoweredModel` whose every tensor between look-ups and outputs holds integers.

    ``model`` runs ``graph`` with the ops between two products as one pass over memory each (``kernels/rows.cpp``, the same bits), where
    there is a C++ compiler; ``unfused`` says why not. ``print(model)`` is a table: every op that computes, and which take 64 bits.
    """

    def __init__(
        self, model: nn.Module, graph: fx.GraphModule, config: QuantConfig, quantizers: Mapping[str, FakeQuantizer], fallback: str
    ) -> None:
        super().__init__(model, graph, config, quantizers, fallback)
        self.unfused = missing_for_rows(next(model.parameters()).device.type)
        if not self.unfused:
            self.model.__dict__["forward"].graph = in_rows(graph)

    def export_onnx(self, path: str | Path) -> None:
        """Write the integer graph as ONNX (opset 20): integer operators from the look-ups to the last rescale, any batch and length.

        ONNX Runtime gives the outputs of this model to the bit, without VNNI too.

        Raises:
            OnnxError: ``path`` is a folder, or an op has no translation (``force_dequant`` leaves some in floating point that have).
            ImportError: ``pip install 'quantsim[onnx]'`` is missing.
        """
        from quantsim.formats.onnx.integer import export_integers

        export_integers(path, self.graph, self.config)

    def __repr__(self) -> str:
        return f"IntegerModel({type(self.model).__name__}, {self.config.name}: {self.bytes / 1e6:.1f} MB)"

    def __str__(self) -> str:
        note = f"\nproducts are computed in float32, exact: {self.fallback}" if self.fallback else ""
        return integer_table(self.graph) + note


def compiled(graph: fx.GraphModule, backend: str) -> Callable[..., Any]:
    """The graph under ``torch.compile``: dynamic shapes, no graph breaks, weights as constants."""
    function = torch.compile(graph, dynamic=True, fullgraph=True, backend=backend)

    def run(**inputs: Tensor) -> Any:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # read when Dynamo traces; options= comes too late
            return function(**inputs)

    return run


class _InferenceForward(GraphForward):
    """The forward of a lowered model: it computes losses only of labels that the simulation had seen before it was lowered."""

    def _with_loss(self, output: Any, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Any:
        key = tuple(sorted((f"{name}:{x.dtype}" for name, x in labels.items())))
        if key not in self.losses:
            raise LoweringError(
                f"{type(self.model).__name__}: is lowered and has no loss for {', '.join(labels)}; compute it from the outputs, or call "
                "sim.model once with such labels before sim.lower()"
            )
        return super()._with_loss(output, inputs, labels)


def _shell(model: nn.Module, graph: fx.GraphModule) -> nn.Module:
    """An instance of the model's class without its weights, whose forward runs the graph."""
    forward = model.__dict__["forward"]
    weightless = {id(p): nn.Parameter(torch.empty(0), requires_grad=False) for p in model.parameters()}
    weightless |= {id(b): torch.empty(0) for b in model.buffers()}  # type: ignore[misc]
    weightless |= {id(forward): None, id(getattr(model, "hf_quantizer", forward)): None}  # type: ignore[dict-item]
    shell = copy.deepcopy(model, weightless)
    shell._modules.clear()
    shell._parameters.clear()
    shell._buffers.clear()
    for name, child in graph.named_children():
        shell.add_module(name, child)
    new = _InferenceForward(shell, graph)
    new.losses = dict(forward.losses)
    shell.forward = new
    like = next(model.parameters())
    # transformers asks a model's first parameter for its dtype and device
    shell.register_parameter("no_weights", nn.Parameter(torch.empty(0, dtype=like.dtype, device=like.device)))
    shell.eval()
    shell.is_quantized = False  # type: ignore[assignment]  # to transformers this means one to train, which Trainer.evaluate refuses
    shell.train = partial(_refuse_training, shell)  # type: ignore[method-assign]
    shell.save_pretrained = partial(_refuse_saving, type(model).__name__)  # type: ignore[assignment]
    shell.requires_grad_(False)
    return shell


def _refuse_training(shell: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise LoweringError(
            "a lowered model is for inference: its weights are integers. Train the simulation (sim.model) and lower it again"
        )
    return shell


def _refuse_saving(name: str, *_: Any, **__: Any) -> None:
    raise LoweringError(f"{name}: is lowered, and transformers can't save integer weights; call save_pretrained of what sim.lower() gave")


def _compact_state(model: nn.Module, graph: fx.GraphModule) -> dict[str, Callable[[], Tensor]]:
    """How to get each of the model's tensors: integers from the graph that holds them, the rest as they are."""
    integers, state = dict(_integers(graph)), plain_state(model)
    tied = {_memory(x): integers[name] for name, x in state.items() if name in integers}
    return {name: tied[_memory(x)] if _memory(x) in tied else _as_is(x) for name, x in state.items()}


def _memory(x: Tensor) -> tuple[int, torch.Size]:
    return x.data_ptr(), x.shape


def _as_is(x: Tensor) -> Callable[[], Tensor]:
    kept = x.detach().clone()
    return lambda: kept


def _integers(graph: fx.GraphModule) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The int8 weights of products and embeddings, by parameter name."""
    for module in graph.modules():
        if isinstance(module, Int8Linear):
            for name, rows in module.parts():
                yield name, lambda module=module, rows=rows: module.integers()[rows].contiguous()  # type: ignore[misc]
    for path, buffer in graph.named_buffers():
        if path.startswith(f"{ROOM}.") and path.endswith(f".{ROWS}"):
            yield path.removeprefix(f"{ROOM}.").removesuffix(f".{ROWS}"), lambda buffer=buffer: buffer  # type: ignore[misc]
