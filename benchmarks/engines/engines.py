"""Every engine: a name, and how to get a callable that runs one batch. Imports are inside, for a worker loads its own engine alone.

All run the same weights (a folder of ``save_pretrained``), the same int64 inputs, and give the same logits up to quantization.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertForSequenceClassification

from quantsim.formats.onnx.runtime import open_session

Array = np.ndarray
Batch = Mapping[str, torch.Tensor]
Run = Callable[[Batch], Any]


def load(folder: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folder).eval()


def calibration(folder: Path) -> list[dict[str, torch.Tensor]]:
    batches: list[dict[str, torch.Tensor]] = torch.load(folder / "calibration.pt", weights_only=True)
    return batches


# ---- torch ----


def fp32(folder: Path) -> Run:
    model = load(folder)
    return lambda batch: model(**batch).logits


def fp32_compiled(folder: Path) -> Run:
    model = torch.compile(load(folder), dynamic=True, options={"freezing": True})
    return lambda batch: model(**batch).logits


def bf16(folder: Path) -> Run:
    model = load(folder).to(torch.bfloat16)
    return lambda batch: model(**batch).logits.float()


def torchao_pt2e(folder: Path) -> Run:
    """torchao's PT2E flow with its X86Inductor quantizer: static, per channel, compiled with freezing."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = load(folder)
    example = calibration(folder)[0]
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    exported = torch.export.export(model, (), kwargs=dict(example), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for batch in calibration(folder):
        prepared(**batch)
    torch._inductor.config.freezing = True
    compiled = torch.compile(convert_pt2e(prepared), dynamic=True)
    return lambda batch: compiled(**batch).logits


# ---- ours ----


def _simulation(folder: Path, preset: str) -> Any:
    from quantsim import QuantSim

    sim = QuantSim(load(folder), preset, in_place=True)
    sim.compute_encodings(calibration(folder))
    sim.freeze_ranges()
    return sim


def simulated(preset: str) -> Callable[[Path], Run]:
    def make(folder: Path) -> Run:
        model = _simulation(folder, preset).model
        return lambda batch: model(**batch).logits

    return make


def simulated_compiled(preset: str) -> Callable[[Path], Run]:
    """Without frozen constants: Inductor has no way to read a constant zero point of a fake quantizer."""

    def make(folder: Path) -> Run:
        model = torch.compile(_simulation(folder, preset).graph, dynamic=True, fullgraph=True)
        return lambda batch: model(**batch).logits

    return make


def lowered(preset: str, compiled: bool = False) -> Callable[[Path], Run]:
    def make(folder: Path) -> Run:
        found = _simulation(folder, preset).lower()
        model = (found.compile() if compiled else found).model
        return lambda batch: model(**batch).logits

    return make


# ---- ONNX Runtime and OpenVINO ----


def _numpy(batch: Batch) -> dict[str, Array]:
    return {name: x.numpy() for name, x in batch.items()}


def _float_onnx(folder: Path) -> Path:
    """The FP32 model as torch exports it, prepared as ONNX Runtime's quantizers ask for (constants folded, shapes inferred); made once."""
    path = folder / "fp32.onnx"
    if not path.exists():
        from onnxruntime.quantization.shape_inference import quant_pre_process

        exported, staging = folder / "exported.onnx", folder / "staging.onnx"
        example = calibration(folder)[0]
        shapes = {name: {0: "batch", 1: "sequence"} for name in example}
        torch.onnx.export(load(folder), (), exported, kwargs=example, dynamic_shapes=shapes, dynamo=True, external_data=False)
        quant_pre_process(exported, staging, skip_symbolic_shape=True)
        staging.rename(path)
    return path


def _float_openvino(folder: Path) -> Any:
    """The FP32 model as OpenVINO converts it from torch."""
    import openvino

    example = calibration(folder)[0]
    model = openvino.convert_model(load(folder), example_input=dict(example))
    model.reshape({name: [-1, -1] for name in example})
    return model


def _onnxruntime(model: Path | bytes) -> Run:
    session = open_session(model, threads=torch.get_num_threads())  # ours and theirs with products that are exact on every CPU
    names = [x.name for x in session.get_inputs()]
    first = [session.get_outputs()[0].name]
    return lambda batch: session.run(first, {name: x for name, x in _numpy(batch).items() if name in names})[0]


def onnxruntime_fp32(folder: Path) -> Run:
    return _onnxruntime(_float_onnx(folder))


def onnxruntime_dynamic(folder: Path) -> Run:
    """ONNX Runtime's own dynamic quantization: ranges of activations taken at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as staging:
        path = Path(staging) / "dynamic.onnx"
        quantize_dynamic(_float_onnx(folder), path, weight_type=QuantType.QInt8, per_channel=True)
        return _onnxruntime(path.read_bytes())


def onnxruntime_static(folder: Path) -> Run:
    """ONNX Runtime's own static QDQ quantization of its matrix products."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([_numpy(batch) for batch in calibration(folder)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as staging:
        path = Path(staging) / "static.onnx"
        quantize_static(
            _float_onnx(folder),
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return _onnxruntime(path.read_bytes())


def onnxruntime_ours(preset: str) -> Callable[[Path], Run]:
    """Our QDQ file in ONNX Runtime."""

    def make(folder: Path) -> Run:
        with tempfile.TemporaryDirectory() as staging:
            path = Path(staging) / "qdq.onnx"
            _simulation(folder, preset).export_onnx(path)
            return _onnxruntime(path.read_bytes())

    return make


def _openvino(model: Any, precision: str = "f32") -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    names = [x.get_any_name() for x in compiled.inputs]
    return lambda batch: compiled({name: x for name, x in _numpy(batch).items() if name in names})[0]


def openvino_fp32(folder: Path) -> Run:
    return _openvino(_float_openvino(folder))


def openvino_bf16(folder: Path) -> Run:
    return _openvino(_float_openvino(folder), "bf16")


def openvino_nncf(folder: Path) -> Run:
    """NNCF's post-training int8 with its transformer preset."""
    import nncf

    model = _float_openvino(folder)
    names = [x.get_any_name() for x in model.inputs]
    batches = nncf.Dataset(calibration(folder), lambda batch: {name: x for name, x in _numpy(batch).items() if name in names})
    return _openvino(nncf.quantize(model, batches, model_type=nncf.ModelType.TRANSFORMER))


def openvino_ours(preset: str) -> Callable[[Path], Run]:
    """Our QDQ file in OpenVINO."""

    def make(folder: Path) -> Run:
        import openvino

        with tempfile.TemporaryDirectory() as staging:
            path = Path(staging) / "qdq.onnx"
            _simulation(folder, preset).export_onnx(path, exact=False)
            return _openvino(openvino.Core().read_model(path.read_bytes()))

    return make


# ---- simulators ----


def aimet_torch(folder: Path) -> Run:
    """AIMET's simulation of the unmodified model: no quantizer on the products, sums and softmax of attention."""
    from aimet_torch.quantsim import QuantizationSimModel

    model = load(folder)
    model.config.return_dict = False
    batches = calibration(folder)
    dummy = tuple(batches[0][name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    sim = QuantizationSimModel(model, dummy, quant_scheme="tf")
    with torch.no_grad():
        sim.compute_encodings(lambda m, _: [m(**batch) for batch in batches], None)
    return lambda batch: sim.model(**batch)[0]


def brevitas(folder: Path) -> Run:
    """Brevitas' simulation of the linears alone: weights per channel, inputs per tensor; nothing between linears is quantized."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    formats = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": ShiftedUint8ActPerTensorFloat, "return_quant_tensor": False}
    model = layerwise_quantize(load(folder), {torch.nn.Linear: (QuantLinear, formats)}).eval()
    with torch.no_grad(), calibration_mode(model):
        for batch in calibration(folder):
            model(**batch)
    return lambda batch: model(**batch).logits


ENGINES: Mapping[str, Callable[[Path], Run]] = {
    "torch FP32": fp32,
    "torch FP32 compiled": fp32_compiled,
    "torch bf16": bf16,
    "torchao PT2E int8": torchao_pt2e,
    "ONNX Runtime FP32": onnxruntime_fp32,
    "ONNX Runtime dynamic int8": onnxruntime_dynamic,
    "ONNX Runtime static int8": onnxruntime_static,
    "OpenVINO FP32": openvino_fp32,
    "OpenVINO bf16": openvino_bf16,
    "OpenVINO NNCF int8": openvino_nncf,
    "AIMET simulated": aimet_torch,
    "Brevitas simulated linears": brevitas,
    "ours aimet simulated": simulated("aimet"),
    "ours aimet simulated compiled": simulated_compiled("aimet"),
    "ours aimet lowered": lowered("aimet"),
    "ours aimet lowered compiled": lowered("aimet", compiled=True),
    "ours aimet in ONNX Runtime": onnxruntime_ours("aimet"),
    "ours deploy simulated": simulated("deploy"),
    "ours deploy lowered": lowered("deploy"),
    "ours deploy lowered compiled": lowered("deploy", compiled=True),
    "ours deploy in ONNX Runtime": onnxruntime_ours("deploy"),
    "ours deploy in OpenVINO": openvino_ours("deploy"),
}

BASELINE = "torch FP32"
OWN_VENV: Mapping[str, tuple[str, ...]] = {
    "AIMET simulated": ("torch==2.13.0", "aimet-torch==2.42.0"),
    "Brevitas simulated linears": ("torch==2.13.0", "brevitas==0.13.4"),
}
"""Engines whose packages don't fit beside the others, and what their environment is made of."""
