"""What a quantized model is evaluated on: the simulation, or an engine that runs it as it will be deployed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantsim import IntegerError, QuantSim
from quantsim.formats.onnx.runtime import open_session
from quantsim.kernels.cpu import missing_for_int8
from recipes.tasks import RecipeError

Run = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
SIMULATED, INTEGERS = "simulated", "integers"


def on_simulation(sim: QuantSim) -> nn.Module:
    return sim.model


def on_int8(sim: QuantSim) -> nn.Module:
    return sim.lower().model


def on_int8_exact(sim: QuantSim) -> nn.Module:
    """Logits to the bit those of the simulation."""
    return sim.lower(exact=True).model


def on_int8_compiled(sim: QuantSim) -> nn.Module:
    return sim.lower().compile().model


def on_integers(sim: QuantSim) -> nn.Module:
    """Every tensor between look-ups and logits holds integers; for preset ``ibert``, or another that has a quantizer at every product."""
    return sim.integer_only().model


def on_onnxruntime(sim: QuantSim) -> nn.Module:
    """The QDQ file in ONNX Runtime, with as many threads as torch has; with preset ``aimet``, logits to the bit those of the simulation."""
    _engine("onnxruntime", "onnx")
    session = _exported(sim, lambda path: open_session(path, threads=torch.get_num_threads()))
    taken, given = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        found = session.run(given, {name: inputs[name] for name in taken})
        return {name: torch.from_numpy(x) for name, x in zip(given, found, strict=True)}

    return EngineModel(run)


def on_openvino(sim: QuantSim) -> nn.Module:
    """The QDQ file in OpenVINO, with as many threads as torch has, and float32 where it isn't quantized."""
    openvino = _engine("openvino", "bench")
    if saturates := missing_for_int8():  # its products are oneDNN's too
        warnings.warn(f"openvino: figures will be of wrong products: {saturates}", stacklevel=2)
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = _exported(sim, lambda path: core.compile_model(core.read_model(path), "CPU", settings), exact=False)
    taken = [x.get_any_name() for x in compiled.inputs]

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        found = compiled({name: inputs[name] for name in taken})
        return {x.get_any_name(): torch.from_numpy(found[x].copy()) for x in compiled.outputs}

    return EngineModel(run)


BACKENDS: Mapping[str, Callable[[QuantSim], nn.Module]] = {
    SIMULATED: on_simulation,
    "int8": on_int8,
    "int8-exact": on_int8_exact,
    "int8-compiled": on_int8_compiled,
    "onnxruntime": on_onnxruntime,
    "openvino": on_openvino,
    INTEGERS: on_integers,
}


def on_backend(sim: QuantSim, name: str) -> nn.Module:
    """The model as this backend runs it.

    Raises:
        RecipeError: it cannot; the message says why.
    """
    try:
        return BACKENDS[name](sim)
    except IntegerError as error:
        raise RecipeError(f"--backend {name}: {error}") from error


class EngineModel(nn.Module):
    """An engine's session behind the call of a ``transformers`` encoder."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """``[rows, tokens]`` → the outputs by name. No mask is a mask of ones, no types are zeros."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        inputs = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
        return self.run({name: x.numpy() for name, x in inputs.items()})


def _exported(sim: QuantSim, load: Callable[[Path], Any], exact: bool = True) -> Any:
    """What ``load`` makes of the QDQ file; weights of a large model lie in a second file beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        sim.export_onnx(path, exact=exact)
        return load(path)


def _engine(name: str, extra: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise RecipeError(f'--backend {name}: is not installed; pip install -e ".[{extra}]"') from error
