"""ONNX Runtime: sessions, and the settings under which its integers are the file's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantsim.formats.onnx.extra import need

NO_CONFIG: Mapping[str, str] = MappingProxyType({})

SAFE_CONFIG: Mapping[str, str] = MappingProxyType({"session.x64quantprecision": "1", "session.qdq_matmulnbits_accuracy_level": "1"})
"""Session options under which a product of integers is exact on every CPU.

``x64quantprecision``: on an x86 CPU without VNNI ONNX Runtime adds pairs of ``uint8 × int8`` products in 16 bits, which saturate
(255·127 + 255·127 comes out as 32,767); 1 makes it shift int8 weights to uint8, whose products it adds in 32 bits. With VNNI
nothing changes. ``qdq_matmulnbits_accuracy_level``: a linear with integer weights and a wider input becomes a MatMulNBits, which
by default (4) quantizes that input to 8 bits on its own; 1 computes in float32.
"""


def open_session(
    model: str | Path | bytes, *, optimize: bool = True, threads: int | None = None, config: Mapping[str, str] = SAFE_CONFIG
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        optimize: with all graph optimizations, which put integer kernels in place of QDQ; without, every operator as it is written.
        threads: within an operator; ``None`` is ONNX Runtime's choice.
        config: entries of ``SessionOptions.add_session_config_entry``.

    Raises:
        ImportError: ``onnxruntime`` isn't installed.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"])


def saturates(config: Mapping[str, str] = NO_CONFIG) -> bool:
    """Whether ONNX Runtime's ``uint8 × int8`` products saturate on this CPU, under these session options: tried, not looked up.

    Raises:
        ImportError: ``onnx`` or ``onnxruntime`` isn't installed.
    """
    need("onnx", "onnxruntime")
    return _saturates(tuple(sorted(config.items())))


@cache
def _saturates(config: tuple[tuple[str, str], ...]) -> bool:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    x, y = np.full((16, 256), 255, dtype=np.uint8), np.full((256, 16), 127, dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (16, 16))],
        [numpy_helper.from_array(y, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (found,) = open_session(model.SerializeToString(), threads=1, config=dict(config)).run(None, {"x": x})
    return bool((found != 255 * 127 * 256).any())
