"""ONNX Runtime under the options that keep its integers exact, on whatever CPU this is."""

from __future__ import annotations

from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="onnx isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'quantsim[onnx]'")

from quantsim.formats.onnx import compare_onnx  # noqa: E402
from quantsim.formats.onnx.runtime import SAFE_CONFIG, saturates  # noqa: E402
from tests.formats.test_onnx import other_shapes  # noqa: E402
from tests.tiny import tiny_sim  # noqa: E402


def test_products_are_exact_under_the_safe_options() -> None:
    assert not saturates(SAFE_CONFIG)


@pytest.mark.skipif(not saturates(), reason="this CPU's products don't saturate")
def test_parity_names_saturation_as_the_cause(tmp_path: Path) -> None:
    sim, path = tiny_sim(), tmp_path / "model.onnx"
    sim.export_onnx(path, exact=False)
    assert "saturate in ONNX Runtime" in str(compare_onnx(path, sim.graph, other_shapes(), session_config={}))
    assert "saturate in ONNX Runtime" not in str(compare_onnx(path, sim.graph, other_shapes()))


def test_an_exact_file_needs_no_options(tmp_path: Path) -> None:
    sim, path = tiny_sim(), tmp_path / "model.onnx"
    sim.export_onnx(path)
    parity = compare_onnx(path, sim.graph, other_shapes(), session_config={})
    assert [edge for edge in parity.edges if edge.off_by_one + edge.off_by_more] == []
    assert [x.largest_difference for x in parity.outputs] == [0.0]


def test_a_file_of_single_operators_has_symmetric_int8_weights(tmp_path: Path) -> None:
    """As compilers that look for them expect (TensorRT takes no other weights)."""
    sim, path = tiny_sim(), tmp_path / "model.onnx"
    sim.export_onnx(path, exact=False)
    types = {x.name: x.data_type for x in onnx.load(path).graph.initializer}
    assert {kind for name, kind in types.items() if name.endswith("dense.weight.quantized")} == {onnx.TensorProto.INT8}
