"""The integer graph as ONNX: integer operators, and in ONNX Runtime the outputs of the integer model to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'quantsim[onnx]'")

from quantsim.formats.onnx import OnnxError, compare_onnx, read_metadata  # noqa: E402
from quantsim.formats.onnx.runtime import open_session  # noqa: E402
from quantsim.lowered import IntegerModel  # noqa: E402
from tests.formats.test_onnx import other_shapes  # noqa: E402
from tests.rewrites.integer_models import FAMILIES, batch_of, simulated  # noqa: E402
from tests.tiny import HEADS, tensors_of, tiny_batch, tiny_sim  # noqa: E402

FLOATING = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def assert_same_bits(model: IntegerModel, path: Path, batch: dict[str, torch.Tensor]) -> None:
    session = open_session(path, config={})
    arrays = session.run(None, {x.name: batch[x.name].numpy() for x in session.get_inputs()})
    expected = tensors_of(model.model(**{x.name: batch[x.name] for x in session.get_inputs()}))
    for x, array in zip(session.get_outputs(), arrays, strict=True):
        assert torch.equal(torch.from_numpy(array), expected[x.name]), x.name


@pytest.mark.parametrize("head", [head if head == "BertForMaskedLM" else pytest.param(head, marks=pytest.mark.slow) for head in HEADS])
def test_every_head(head: str, tmp_path: Path) -> None:
    model, path = tiny_sim(head, config="ibert").integer_only(), tmp_path / "integers.onnx"
    model.export_onnx(path)
    for batch in other_shapes(head):
        assert_same_bits(model, path, batch)


@pytest.mark.parametrize("family", [f if f == "Roberta" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "Bert"])
def test_every_family(family: str, tmp_path: Path) -> None:
    model, path = simulated(family).integer_only(), tmp_path / "integers.onnx"
    model.export_onnx(path)
    assert_same_bits(model, path, batch_of(3, 13) | {"token_type_ids": torch.zeros(3, 13, dtype=torch.long)})


def test_zero_points(tmp_path: Path) -> None:
    """Asymmetric edges: products of UINT8 with sums taken away."""
    model, path = tiny_sim(config="deploy").integer_only(), tmp_path / "integers.onnx"
    model.export_onnx(path)
    assert_same_bits(model, path, tiny_batch(3, 11, seed=4))


def test_nothing_is_in_floating_point_but_the_outputs_last_step(tmp_path: Path) -> None:
    path = tmp_path / "integers.onnx"
    tiny_sim(config="ibert").integer_only().export_onnx(path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {x.name: x.type.tensor_type.elem_type for x in [*model.graph.value_info, *model.graph.output]}
    depends, floats = {x.name for x in model.graph.input}, []
    for node in model.graph.node:
        if depends & set(node.input):  # else it is a number that any runtime works out when it opens the file
            depends |= set(node.output)
            floats += [node.op_type for x in node.output if types[x] in FLOATING]
    assert floats == ["Cast", "Sub", "Mul"]
    assert model.graph.node[-1].op_type == "Mul"
    assert [x.name for x in model.graph.initializer if x.data_type in FLOATING and np.prod(x.dims) > 1] == []


def test_weights_are_stored_once_in_8_bits(tmp_path: Path) -> None:
    path = tmp_path / "integers.onnx"
    sim = tiny_sim(config="ibert")
    sim.integer_only().export_onnx(path)
    stored = {x.name: x for x in onnx.load(path).graph.initializer}
    linears = [p for p in sim.placements if p.role == "weight" and "embeddings" not in p.name and "LayerNorm" not in p.name]
    kinds = {onnx.TensorProto.DataType.Name(stored[f"integers.{p.name}.rows.unsigned"].data_type) for p in linears}
    assert (len(linears), kinds) == (14, {"UINT8"})


@pytest.mark.parametrize("force_dequant", ["nonlinear", pytest.param("gelu", marks=pytest.mark.slow)])
def test_functions_that_were_forced_to_floats_stay_so(force_dequant: str, tmp_path: Path) -> None:
    model, path = tiny_sim(config="ibert").integer_only(force_dequant), tmp_path / "integers.onnx"
    model.export_onnx(path)
    batch = tiny_batch(3, 11, seed=4)
    session = open_session(path)
    (found,) = session.run(["logits"], {x.name: batch[x.name].numpy() for x in session.get_inputs()})
    expected = model.model(**batch).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_it_has_no_edges_to_compare(tmp_path: Path) -> None:
    sim, path = tiny_sim(config="ibert"), tmp_path / "integers.onnx"
    sim.integer_only().export_onnx(path)
    assert read_metadata(path) == {"integers": True, "config": sim.config.to_dict()}
    with pytest.raises(OnnxError, match="an integer graph, without QDQ; expected a file of QuantSim"):
        compare_onnx(path, sim.graph, other_shapes())


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="is a folder; expected the file to write"):
        tiny_sim(config="ibert").integer_only().export_onnx(tmp_path)
    assert list(tmp_path.iterdir()) == []
