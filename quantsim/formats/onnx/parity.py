"""An exported file and the simulation that it came from, compared edge by edge in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from quantsim.formats.onnx.capture import leaves
from quantsim.formats.onnx.extra import OnnxError, need
from quantsim.formats.onnx.runtime import SAFE_CONFIG, open_session, saturates
from quantsim.formats.onnx.write import read_metadata
from quantsim.numerics.affine import quantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer

SIMULATED = ".simulated"
Batch = Mapping[str, Tensor]


@dataclass
class OnnxEdge:
    """The integers of one activation edge, over all batches.

    Attributes:
        name: the placement's.
        values: how many were compared.
        off_by_one, off_by_more: those that are one step from the simulation's, and more than one.
        largest_difference: in steps.
    """

    name: str
    values: int = 0
    off_by_one: int = 0
    off_by_more: int = 0
    largest_difference: int = 0

    def compare(self, found: Tensor, expected: Tensor) -> None:
        off = (found.int() - expected).abs()
        self.values += off.numel()
        self.off_by_one += int((off == 1).sum())
        self.off_by_more += int((off > 1).sum())
        self.largest_difference = max(self.largest_difference, int(off.max()))


@dataclass
class OnnxOutput:
    """One output of the model, the file running freely.

    Attributes:
        largest_difference: of a value.
        rows, differing: vectors along the last axis, and those whose largest value is at another index.
    """

    name: str
    largest_difference: float = 0.0
    rows: int = 0
    differing: int = 0

    def compare(self, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            raise OnnxError(f"output {self.name}: {list(found.shape)}; the simulation gives {list(expected.shape)}")
        self.largest_difference = max(self.largest_difference, (found - expected).abs().max().item())
        self.rows += expected.shape[:-1].numel()
        self.differing += int((found.argmax(-1) != expected.argmax(-1)).sum())


@dataclass
class OnnxParity:
    """What :func:`compare_onnx` found.

    Attributes:
        edges: each edge computed from the simulation's integers of the edges before it.
        outputs: the file as it is, from the model's inputs on.
        optimized: ONNX Runtime's graph optimizations were on.
        saturates: its int8 products saturate on this CPU, under the session options that were given.
    """

    optimized: bool
    saturates: bool = False
    edges: list[OnnxEdge] = field(default_factory=list)
    outputs: list[OnnxOutput] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """No integer is off by more than a step."""
        return not any(edge.off_by_more for edge in self.edges)

    def __str__(self) -> str:
        edges = [(e.name, e.values, e.off_by_one, e.off_by_more, e.largest_difference) for e in self.edges]
        outputs = [(x.name, x.rows, x.differing, f"{x.largest_difference:.2e}") for x in self.outputs]
        off, more, values = (sum(getattr(e, name) for e in self.edges) for name in ("off_by_one", "off_by_more", "values"))
        runtime = f"ONNX Runtime, optimizations {'on' if self.optimized else 'off'}"
        warning = "this CPU's int8 products saturate in ONNX Runtime; give its session options quantsim.formats.onnx.runtime.SAFE_CONFIG"
        return "\n\n".join(
            [
                *([warning] if self.saturates else []),
                tabulate(edges, headers=("edge", "values", "off by one", "off by more", "largest difference")),
                f"{runtime}: {len(edges)} edges, {values:,} values, {off} off by one step, {more} off by more",
                tabulate(outputs, headers=("output", "rows", "other argmax", "largest difference")),
            ]
        )


@torch.no_grad()
def compare_onnx(
    path: str | Path,
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    optimize: bool = True,
    session_config: Mapping[str, str] = SAFE_CONFIG,
) -> OnnxParity:
    """Run a file of ``QuantSim.export_onnx`` and the simulation's graph on the same batches.

    Every QuantizeLinear becomes an output, and what reads it reads the *simulated* integers in its place, so that one flipped
    value doesn't show in every edge after it: a difference belongs to the edge that it is reported for. The unchanged file runs
    too, for its outputs.

    Args:
        path: the file.
        graph: ``sim.graph``, in the state in which it was exported, on the CPU.
        batches: by keyword, with every input that the file has.
        optimize: with the graph optimizations of ONNX Runtime, which put integer kernels in place of QDQ: what is deployed.
            Without, every operator runs as it is written: the numerics of the file.
        session_config: entries of ONNX Runtime's ``SessionOptions.add_session_config_entry``; by default those that keep products
            of integers exact on every CPU (``runtime.SAFE_CONFIG``). Give ``{}`` for what a session without them would compute.

    Raises:
        OnnxError: the file isn't one of ours, has no QuantizeLinear, or has other edges or outputs than the simulation.
        ImportError: ``onnx`` or ``onnxruntime`` isn't installed.
    """
    need("onnx", "onnxruntime")
    metadata = read_metadata(path)
    if "edges" not in metadata:
        raise OnnxError(f"{path}: an integer graph, without QDQ; expected a file of QuantSim.export_onnx. Its outputs are IntegerModel's")
    placements = {tensor: name for name, tensor in metadata["edges"].items()}
    forced, types = _forced(path, set(placements))
    walked, free = (open_session(model, optimize=optimize, config=session_config) for model in (forced, str(path)))
    edges = {tensor: OnnxEdge(placements[tensor]) for tensor in types}
    outputs = {x.name: OnnxOutput(x.name) for x in free.get_outputs()}
    for batch in batches:
        inputs = _inputs(free, batch, path)
        walk = _Walk(graph)
        expected = dict(leaves(walk.run(*(batch.get(str(node.target)) for node in graph.graph.find_nodes(op="placeholder")))))
        integers = {tensor: _of(walk.integers, edge.name, path) for tensor, edge in edges.items()}
        integers = {tensor: x - lowest * (types[tensor].kind == "u") for tensor, (x, lowest) in integers.items()}  # shifted to UINT8
        given = {f"{tensor}{SIMULATED}": x.numpy().astype(types[tensor]) for tensor, x in integers.items()}
        for tensor, x in _run(walked, inputs | given, list(edges)).items():
            edges[tensor].compare(x, integers[tensor])
        for name, x in _run(free, inputs, list(outputs)).items():
            outputs[name].compare(x, _of(expected, name, path))
    return OnnxParity(optimize, saturates(session_config), list(edges.values()), list(outputs.values()))


class _Walk(fx.Interpreter):
    """Runs the simulation in evaluation, and keeps the integers of every activation edge."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.integers: dict[str, tuple[Tensor, int]] = {}  # and the grid's lowest

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, nn.Dropout):
            return args[0]
        if isinstance(module, FakeQuantizer) and module.calibrated and not isinstance(module, WeightQuantizer):
            params = module.affine_params()
            self.integers[module.name] = (quantize(args[0], params), params.quant_min)
        return super().call_module(target, args, kwargs)


def _forced(path: str | Path, edges: set[str]) -> tuple[bytes, dict[str, Any]]:
    """The model with every edge's integers as an output, and read from an input; and the NumPy type of each edge's integers.

    Args:
        edges: the tensors that hold an edge's integers.
    """
    import onnx
    from onnx import helper

    model = onnx.load(path)
    graph = model.graph
    known = {value.name: value for value in graph.value_info}
    quantized = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear" and node.output[0] in edges]
    if not quantized:
        raise OnnxError(f"{path}: no QuantizeLinear of an edge; expected a file with quantized activations")
    types: dict[str, Any] = {}
    for tensor in quantized:
        value = onnx.ValueInfoProto.FromString(known[tensor].SerializeToString())
        value.name = f"{tensor}{SIMULATED}"
        graph.input.append(value)
        graph.output.append(known[tensor])
        types[tensor] = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in types:
                node.input[i] = f"{name}{SIMULATED}"
    return model.SerializeToString(), types


def _inputs(session: Any, batch: Batch, path: str | Path) -> dict[str, Any]:
    names = [x.name for x in session.get_inputs()]
    if missing := [name for name in names if name not in batch]:
        raise OnnxError(f"{path}: takes {', '.join(names)}; the batch lacks {', '.join(missing)}")
    return {name: batch[name].numpy() for name in names}


def _run(session: Any, inputs: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
    return dict(zip(names, map(_tensor, session.run(names, inputs)), strict=True))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.astype("int32") if array.dtype.kind in "iu" else array)


def _of(found: Mapping[str, Any], name: str, path: str | Path) -> Any:
    if name not in found:
        raise OnnxError(f"{path}: has {name!r}, which the simulation lacks; expected the simulation that it was exported from")
    return found[name]
