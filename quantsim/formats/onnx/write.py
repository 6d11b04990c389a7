"""A simulation → an ONNX file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, fx

from quantsim.config import QuantConfig
from quantsim.formats.onnx.capture import marked_graph, to_ir
from quantsim.formats.onnx.edges import Bias, check_opset, int32_biases, stored_edges, stored_unsigned
from quantsim.formats.onnx.exact import insert_exact
from quantsim.formats.onnx.extra import NEEDED_TO_EXPORT, OnnxError, need
from quantsim.formats.onnx.qdq import insert_qdq, name_edges, sweep
from quantsim.quantizers.fake_quantizer import WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

METADATA = "quantsim"
LARGEST_FILE = 2**31 - 2**26  # protobuf ends at 2 GiB; what is not tensors needs room too


def export_onnx(
    path: str | Path,
    graph: fx.GraphModule,
    config: QuantConfig,
    weights: Mapping[WeightQuantizer, Tensor],
    *,
    bias: Bias = "float",
    opset: int | None = None,
    quantize: bool = True,
    exact: bool = True,
) -> dict[str, str]:
    """Write a simulated graph; see ``QuantSim.export_onnx``.

    Args:
        weights: of each weight quantizer the whole weight, as ``rewrites.insert_quantizers.weights_of`` gives them.
    """
    need(*NEEDED_TO_EXPORT)
    path = Path(path)
    _check(path, graph, bias)
    edges = stored_edges(graph) if quantize else {}
    nodes, biases = int32_biases(graph) if quantize and bias == "int32" else ({}, {})
    opset = check_opset(opset, edges)
    with torch.no_grad():
        model = to_ir(*marked_graph(graph, weights, nodes, exact and quantize), opset)
        stored = stored_unsigned(edges, opset, exact) | biases
        tensors = insert_qdq(model, stored) if quantize else name_edges(model)
        if exact and quantize:
            insert_exact(model, stored)
        sweep(model)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    produced(model)
    model.metadata_props[METADATA] = json.dumps(
        {"quantized": quantize, "bias": bias, "exact": exact, "config": config.to_dict(), "edges": tensors, "versions": _versions()}
    )
    save(path, model)
    return tensors


def produced(model: ir.Model) -> None:
    """Say who wrote the model."""
    model.producer_name, model.producer_version = METADATA, _versions()["quantsim"]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`export_onnx` wrote beside the graph: ``quantized``, ``bias``, ``config``, ``edges`` and ``versions``.

    Raises:
        FileNotFoundError: there is no such file.
        OnnxError: the file isn't ONNX, or isn't one of ours.
    """
    need("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise OnnxError(f"{path}: cannot be read as ONNX ({error}); it may be cut short. Export it again") from error
    found = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA)
    if found is None:
        raise OnnxError(f"{path}: no {METADATA!r} in its metadata; expected a file written by QuantSim.export_onnx")
    metadata: dict[str, Any] = json.loads(found)
    return metadata


def _check(path: Path, graph: fx.GraphModule, bias: str) -> None:
    if bias not in get_args(Bias):
        raise OnnxError(f"bias: {bias!r}; expected one of {', '.join(get_args(Bias))}")
    if path.is_dir():
        raise OnnxError(f"{path}: is a folder; expected the file to write")
    for name, x in graph.named_parameters():
        if x.is_floating_point() and x.dtype is not torch.float32:
            raise OnnxError(f"{name}: {x.dtype}; expected torch.float32, in which the simulation divides. Call model.float()")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("quantsim", "torch", "transformers", *NEEDED_TO_EXPORT)}


def save(path: Path, model: ir.Model) -> None:
    """Check and write the model; ``path`` appears when it is complete. Tensors of 2 GiB and more go to ``<path>.data``."""
    import onnx
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=path.parent))
    size = sum(x.const_value.nbytes for x in model.graph.initializers.values() if x.const_value is not None)
    data = f"{path.name}.data" if size > LARGEST_FILE else None
    try:
        ir.save(model, staging / path.name, external_data=data)
        onnx.checker.check_model(staging / path.name, full_check=True)
        for name in filter(None, (data, path.name)):
            (staging / name).replace(path.parent / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
