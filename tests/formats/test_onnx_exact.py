"""ONNX files in ONNX Runtime as it is deployed, all its optimizations on: the simulation's logits to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'quantsim[onnx]'")

from quantsim import QuantConfig, QuantSim, QuantSpec  # noqa: E402
from quantsim.formats.onnx.runtime import open_session  # noqa: E402
from tests.formats.test_onnx import ops, other_shapes  # noqa: E402
from tests.tiny import HEADS, tensors_of, tiny_sim  # noqa: E402

SYMMETRIC = QuantConfig(weights=QuantSpec(8, symmetric=True, axis=0), activations=QuantSpec(8, symmetric=True), mask_clamp=-6.0)
SIX_BITS = QuantConfig(weights=QuantSpec(8, symmetric=True, axis=0), activations=QuantSpec(6), mask_clamp=-6.0)
USUAL = ("BertForSequenceClassification", "BertForQuestionAnswering", "BertForMaskedLM", "BertForMultipleChoice")


def assert_same_bits(sim: QuantSim, path: Path, head: str) -> None:
    session = open_session(path, config={})
    for batch in other_shapes(head):
        arrays = session.run(None, {x.name: batch[x.name].numpy() for x in session.get_inputs()})
        with torch.no_grad():
            expected = tensors_of(sim.model(**batch))
        for x, array in zip(session.get_outputs(), arrays, strict=True):
            assert torch.equal(torch.from_numpy(array), expected[x.name]), x.name


@pytest.mark.parametrize("head", [head if head in USUAL else pytest.param(head, marks=pytest.mark.slow) for head in HEADS])
def test_every_head(head: str, tmp_path: Path) -> None:
    sim = tiny_sim(head)
    sim.export_onnx(tmp_path / "a.onnx")
    assert_same_bits(sim, tmp_path / "a.onnx", head)


CONFIGS = {"per tensor": "aimet_per_tensor", "symmetric": SYMMETRIC, "6 bits": SIX_BITS}
OPSETS = (18, 20, 21)
GRIDS = [  # each config and each opset once; all of both are slow
    pytest.param(config, opset, id=f"{name}-{opset}", marks=[pytest.mark.slow] if i != j else [])
    for i, (name, config) in enumerate(CONFIGS.items())
    for j, opset in enumerate(OPSETS)
]


@pytest.mark.parametrize(("config", "opset"), GRIDS)
def test_other_grids_and_opsets(config: QuantConfig | str, opset: int, tmp_path: Path) -> None:
    head = "BertForSequenceClassification"
    sim = tiny_sim(head, config)
    sim.export_onnx(tmp_path / "a.onnx", opset=opset)
    assert_same_bits(sim, tmp_path / "a.onnx", head)


def test_a_constant_row_under_a_norm(tmp_path: Path) -> None:
    """Its variance is 0, and eps alone is under the root: torch.onnx drops a sum with so small a constant."""
    head = "BertForSequenceClassification"
    sim = tiny_sim(head)
    with torch.no_grad():
        for name, x in sim.model.named_parameters():
            if "embeddings" in name and "LayerNorm" not in name:
                x.fill_(0.01)
    sim.export_onnx(tmp_path / "a.onnx")
    assert_same_bits(sim, tmp_path / "a.onnx", head)
    with torch.no_grad():
        assert all(x.isfinite().all() for x in tensors_of(sim.model(**other_shapes(head)[0])).values())


def test_single_operators_where_they_are_asked_for(tmp_path: Path) -> None:
    sim = tiny_sim("BertForSequenceClassification")
    sim.export_onnx(tmp_path / "exact.onnx")
    sim.export_onnx(tmp_path / "single.onnx", exact=False)
    exact, single = ops(tmp_path / "exact.onnx"), ops(tmp_path / "single.onnx")
    assert not {"LayerNormalization", "Softmax", "Erf", "Gelu", "Tanh"} & set(exact)
    assert {"LayerNormalization", "Softmax", "Tanh"} <= set(single)
    assert exact["GatherElements"] == 2 * 2 + 1  # softmax and GELU of two layers, tanh of the pooler
