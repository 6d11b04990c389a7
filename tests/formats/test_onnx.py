"""QDQ ONNX files: ONNX Runtime computes what the simulation computes, edge by edge; what can't be written is refused."""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

onnx = pytest.importorskip("onnx", reason="onnx isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'quantsim[onnx]'")

from quantsim import QuantConfig, QuantSim, QuantSpec, Rule, State  # noqa: E402
from quantsim.formats.onnx import OnnxError, compare_onnx, read_metadata, write  # noqa: E402
from quantsim.formats.onnx.runtime import open_session  # noqa: E402
from quantsim.numerics.affine import quantize  # noqa: E402
from quantsim.rewrites.insert_quantizers import weights_of  # noqa: E402
from tests.rewrites.test_insert_quantizers import LowRank  # noqa: E402
from tests.tiny import HEADS, batch_for, tensors_of, tiny_batch, tiny_bert, tiny_sim  # noqa: E402

ONE_LAYER = "BertForTokenClassification"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@cache
def exported(folder: Path, head: str = ONE_LAYER, config: QuantConfig | str = "aimet", **how: Any) -> tuple[QuantSim, Path]:
    """A simulation and its file, written once for all tests."""
    sim = tiny_sim(head, config)
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    sim.export_onnx(path, **how)
    return sim, path


@cache
def exported_float(folder: Path) -> tuple[QuantSim, Path, dict[str, str]]:
    """A simulation, the file of its model without quantizers, and the names of its tensors."""
    sim, path = tiny_sim(ONE_LAYER), folder / "float.onnx"
    return sim, path, sim.export_onnx(path, quantize=False)


def bits(weights: int, activations: int, symmetric: bool = False) -> QuantConfig:
    return QuantConfig(
        weights=QuantSpec(bits=weights, symmetric=True, axis=0), activations=QuantSpec(bits=activations, symmetric=symmetric)
    )


def run(path: Path, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    session = open_session(path, optimize=False)
    arrays = session.run(None, {name: x.numpy() for name, x in batch.items()})
    return {x.name: torch.from_numpy(array) for x, array in zip(session.get_outputs(), arrays, strict=True)}


def other_shapes(head: str = ONE_LAYER) -> list[dict[str, Tensor]]:
    """None of them what the model was traced with; the last has one row."""
    return [batch_for(head, rows, length, seed) for rows, length, seed in ((3, 7, 5), (8, 21, 6), (1, 10, 7))]


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def initializers(path: Path) -> dict[str, Any]:
    return {x.name: x for x in onnx.load(path).graph.initializer}


def assert_parity(sim: QuantSim, path: Path, head: str = ONE_LAYER, flips: float = 5e-4) -> None:
    """As written: hardly an integer is another one, none by more than a step. As deployed: at most one in a hundred."""
    written = compare_onnx(path, sim.graph, other_shapes(head), optimize=False)
    deployed = compare_onnx(path, sim.graph, other_shapes(head))
    for parity, allowed in ((written, flips), (deployed, 0.01)):
        assert parity.holds, str(parity)
        assert sum(edge.off_by_one for edge in parity.edges) <= allowed * sum(edge.values for edge in parity.edges), str(parity)
        assert [edge.name for edge in parity.edges if edge.values == 0] == []
    activations = {p.name for p in sim.placements if p.spec and p.role != "weight"}
    assert {edge.name for edge in written.edges} == activations
    assert sum(x.differing for x in written.outputs) <= 0.02 * sum(x.rows for x in written.outputs), str(written)


# ---- what the file computes ----


@pytest.mark.parametrize("preset", ["aimet", pytest.param("aimet_per_tensor", marks=pytest.mark.slow), "bondarenko", "deploy"])
def test_every_edge_has_the_simulations_integers(preset: str, folder: Path) -> None:
    assert_parity(*exported(folder, config=preset))


FAST_HEADS = ("BertForSequenceClassification", "BertForMaskedLM", "BertForMultipleChoice")


@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=() if head in FAST_HEADS else pytest.mark.slow) for head in HEADS if head != ONE_LAYER]
)
def test_every_head(head: str, folder: Path) -> None:
    sim, path = exported(folder, head)
    assert_parity(sim, path, head)
    batch = batch_for(head, 3, 7, seed=8)
    with torch.no_grad():
        expected = tensors_of(sim.model(**batch))
    found = run(path, batch)
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].shape == x.shape


@pytest.mark.parametrize(
    "config, stored, opset",
    [
        pytest.param(bits(4, 8), {"INT4", "UINT8"}, 21, marks=pytest.mark.slow),
        (bits(4, 8, symmetric=True), {"INT4", "UINT8"}, 21),  # shifted: ONNX Runtime refuses INT8 activations at opset 21
        pytest.param(bits(8, 4), {"UINT8"}, 20, marks=pytest.mark.slow),
        pytest.param(bits(8, 8, symmetric=True), {"UINT8"}, 20, marks=pytest.mark.slow),
        (bits(8, 16), {"UINT8", "UINT16"}, 21),
        pytest.param(bits(16, 12, symmetric=True), {"INT16"}, 21, marks=pytest.mark.slow),
        (bits(3, 5), {"INT4", "UINT8"}, 21),
        pytest.param(bits(2, 3, symmetric=True), {"INT4", "UINT8"}, 21, marks=pytest.mark.slow),
    ],
    ids=lambda x: f"W{x.weights.bits}A{x.activations.bits}" if isinstance(x, QuantConfig) else "",
)
def test_every_width_is_stored_in_the_next_type(config: QuantConfig, stored: set[str], opset: int, folder: Path) -> None:
    sim, path = exported(folder, config=config)
    assert_parity(sim, path)
    kinds = {onnx.TensorProto.DataType.Name(x.data_type) for name, x in initializers(path).items() if name.endswith(".zero_point")}
    assert kinds == stored
    assert onnx.load(path).opset_import[0].version == opset
    assert config.activations is not None
    assert ("Clip" in {node.op_type for node in onnx.load(path).graph.node if node.name.split(".")[0] in ("bert", "classifier")}) == (
        config.activations.bits not in (8, 16)
    )


def test_values_outside_of_a_grid_within_its_type_are_clamped(folder: Path) -> None:
    sim = tiny_sim(ONE_LAYER, bits(8, 5))
    for quantizer in sim.quantizers.values():
        if "dense.output" in quantizer.name:
            quantizer.set_range(quantizer.min / 4, quantizer.max / 4)
    sim.export_onnx(folder / "narrow.onnx")
    assert_parity(sim, folder / "narrow.onnx")


def test_a_range_per_channel_of_an_activation(folder: Path) -> None:
    rule = Rule(module="*.intermediate.dense.output", set={"axis": -1, "bits": 7})
    sim, path = exported(folder, config=QuantConfig.preset("aimet").with_rules(rule))
    assert_parity(sim, path)
    assert initializers(path)["bert.encoder.layer.0.intermediate.dense.output.scale"].dims == [32]


def test_int32_biases_are_on_the_grid_of_the_products(folder: Path) -> None:
    sim, path = exported(folder, config="deploy", bias="int32")
    found = initializers(path)
    name = "bert.encoder.layer.0.intermediate.dense"
    before = sim.quantizers["bert.encoder.layer.0.attention.output.LayerNorm.output"].affine_params().scale
    scale = before * sim.quantizers[f"{name}.weight"].affine_params().scale
    bias = sim.model.get_parameter(f"{name}.bias").detach()
    stored = torch.from_numpy(onnx.numpy_helper.to_array(found[f"{name}.bias.quantized"]).copy())
    assert stored.dtype == torch.int32
    assert torch.equal(stored, (bias.double() / scale.double()).round().int())
    assert f"{name}.bias" not in found
    assert "bert.embeddings.LayerNorm.bias" in found  # no product adds it
    difference = compare_onnx(path, sim.graph, other_shapes(), optimize=False).outputs[0]
    assert 0 < difference.largest_difference < 0.1
    assert set(read_metadata(path)["edges"]) == set(sim.quantizers)


def test_a_bias_too_large_for_32_bits_stays_in_float(folder: Path) -> None:
    sim = tiny_sim(ONE_LAYER, "deploy")
    with torch.no_grad():
        sim.model.classifier.weight[0] = 0
        sim.model.classifier.bias[0] = 5.0
    sim.compute_encodings([tiny_batch()])
    with pytest.warns(UserWarning, match=r"classifier\.bias: does not fit in 32 bits"):
        sim.export_onnx(folder / "large_bias.onnx", bias="int32")
    assert "classifier.bias" in initializers(folder / "large_bias.onnx")


def test_a_quantizer_that_is_off_leaves_its_tensor(folder: Path) -> None:
    sim = tiny_sim(ONE_LAYER)
    off = {"classifier.output", "classifier.weight", "bert.embeddings.word_embeddings.weight"}
    for name in off:
        sim.quantizers[name].state = State.OFF
    edges = sim.export_onnx(folder / "off.onnx")
    assert set(edges) == set(sim.quantizers) - off
    batch = other_shapes()[0]
    with torch.no_grad():
        expected = sim.model(**batch).logits
    torch.testing.assert_close(run(folder / "off.onnx", batch)["logits"], expected)


# ---- how weights are stored ----


@pytest.mark.parametrize("width", [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(16, marks=pytest.mark.slow)])
def test_weights_are_the_simulations_integers(width: int, folder: Path) -> None:
    sim, path = exported(folder, config="aimet" if width == 8 else bits(width, 8 if width < 16 else 12, symmetric=width == 16))
    found, edges = initializers(path), read_metadata(path)["edges"]
    for quantizer, weight in weights_of(sim.graph):
        params = quantizer.affine_params()
        expected = quantize(weight, params) + 128 * (params.quant_min < 0)  # UINT8, whose products no CPU saturates
        stored = onnx.numpy_helper.to_array(found[edges[quantizer.name]]).astype("int32")
        assert torch.equal(torch.from_numpy(stored), expected), quantizer.name
        assert quantizer.name not in found  # the floating-point weight is gone


def test_embeddings_are_looked_up_as_integers(folder: Path) -> None:
    _, path = exported(folder)
    model = onnx.load(path)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather" and "embeddings" in node.input[0]}
    kinds = ("word", "position", "token_type")
    assert tables == {f"bert.embeddings.{kind}_embeddings.weight.quantized" for kind in kinds}


def test_a_tied_weight_is_stored_once(folder: Path) -> None:
    _, path = exported(folder, "BertForMaskedLM")
    stored = [name for name, x in initializers(path).items() if x.data_type == onnx.TensorProto.UINT8 and list(x.dims) == [99, 16]]
    assert len(stored) == 1
    assert not {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"} & set(initializers(path))


def test_a_computed_weight_is_stored_as_its_value(folder: Path) -> None:
    model = tiny_bert(num_hidden_layers=1)
    parametrize.register_parametrization(model.bert.encoder.layer[0].output.dense, "weight", LowRank(16, 32))
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch()])
    sim.export_onnx(folder / "computed.onnx")
    assert_parity(sim, folder / "computed.onnx")
    assert not [name for name in initializers(folder / "computed.onnx") if "parametrizations" in name or "computed" in name]


# ---- the floating-point model ----


def test_the_float_model_alone_and_the_names_of_its_tensors(folder: Path) -> None:
    sim, path, names = exported_float(folder)
    assert not {"QuantizeLinear", "DequantizeLinear", "Edge"} & set(ops(path))
    model = onnx.load(path)
    known = {name for node in model.graph.node for name in node.output} | set(initializers(path))
    assert set(names) == set(sim.quantizers)
    assert set(names.values()) <= known
    assert names["bert.embeddings.word_embeddings.weight"] == "bert.embeddings.word_embeddings.weight"
    assert names["bert.embeddings.LayerNorm.output"] == "bert.embeddings.LayerNorm.output"
    assert names["classifier.output"] == "logits"
    for quantizer, weight in weights_of(sim.graph):
        stored = onnx.numpy_helper.to_array(initializers(path)[names[quantizer.name]]).copy()
        assert torch.equal(torch.from_numpy(stored), weight.detach()), quantizer.name
    for batch in other_shapes():
        with sim.quantizers_off(), torch.no_grad():
            expected = sim.model(**batch).logits
        torch.testing.assert_close(run(path, batch)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_named_tensor_holds_what_the_quantizer_would_see(folder: Path, tmp_path: Path) -> None:
    _, path, names = exported_float(folder)
    name = names["bert.encoder.layer.0.attention.self.softmax"]
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "seen.onnx")
    probs = run(tmp_path / "seen.onnx", other_shapes()[0])[name]
    assert probs.shape == (3, 2, 7, 7)
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 2, 7))


# ---- what is around the graph ----


def test_inputs_outputs_and_axes_have_the_models_names(folder: Path) -> None:
    _, path = exported(folder)
    graph = onnx.load(path).graph
    shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in [*graph.input, *graph.output]}
    both = ["batch", "sequence"]
    assert shapes == {"input_ids": both, "attention_mask": both, "token_type_ids": both, "logits": [*both, 2]}
    _, choices = exported(folder, "BertForMultipleChoice")
    ids = next(x for x in onnx.load(choices).graph.input if x.name == "input_ids")
    assert [d.dim_param for d in ids.type.tensor_type.shape.dim] == ["batch", "choices", "sequence"]


def test_nested_outputs_and_one_tensor_in_two_of_them(folder: Path) -> None:
    sim = QuantSim(tiny_bert(HEADS["BertModel"], num_hidden_layers=1, output_hidden_states=True))
    sim.compute_encodings([tiny_batch()])
    sim.export_onnx(folder / "hidden.onnx")
    found = run(folder / "hidden.onnx", other_shapes()[0])
    assert list(found) == ["last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1"]
    assert torch.equal(found["last_hidden_state"], found["hidden_states.1"])
    with torch.no_grad():
        expected = sim.model(**other_shapes()[0])
    torch.testing.assert_close(found["hidden_states.0"], expected.hidden_states[0])


def test_the_checker_finds_nothing(folder: Path) -> None:
    _, path = exported(folder)
    onnx.checker.check_model(path, full_check=True)
    assert {x.domain for x in onnx.load(path).opset_import} == {""}


def test_metadata_comes_back(folder: Path) -> None:
    sim, path = exported(folder, config="bondarenko")
    metadata = read_metadata(path)
    assert QuantConfig.from_dict(metadata["config"]) == sim.config
    assert (metadata["quantized"], metadata["bias"]) == (True, "float")
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0] or metadata["versions"]["torch"] == torch.__version__
    assert set(metadata["edges"]) == set(sim.quantizers)


def test_the_simulation_stays_as_it_is(folder: Path) -> None:
    sim = tiny_sim(ONE_LAYER)
    sim.model.train()
    code, states = sim.graph.code, {name: q.state for name, q in sim.quantizers.items()}
    sim.export_onnx(folder / "same.onnx")
    assert sim.graph.code == code
    assert {name: q.state for name, q in sim.quantizers.items()} == states
    assert sim.model.training


def test_large_tensors_go_to_a_file_beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim, small = exported(folder)
    monkeypatch.setattr(write, "LARGEST_FILE", 100)
    path = folder / "large" / "model.onnx"
    sim.export_onnx(path)
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    batch = other_shapes()[0]
    assert torch.equal(run(path, batch)["logits"], run(small, batch)["logits"])


# ---- what is refused ----


def test_an_uncalibrated_simulation_is_refused(tmp_path: Path) -> None:
    sim = tiny_sim(ONE_LAYER, calibrated=False)
    with pytest.raises(OnnxError, match="none of its quantizers is calibrated"):
        sim.export_onnx(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "how, message",
    [
        ({"bias": "int8"}, "bias: 'int8'; expected one of float, int32"),
        ({"opset": 13}, "opset 13; expected 18 or more"),
    ],
    ids=["bias", "opset"],
)
def test_arguments_that_make_no_sense_are_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=message):
        tiny_sim(ONE_LAYER).export_onnx(tmp_path / "model.onnx", **how)


def test_an_opset_without_the_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=r"opset 20: bert\..*weight is stored as INT4, which QuantizeLinear takes from opset 21 on"):
        tiny_sim(ONE_LAYER, bits(4, 8)).export_onnx(tmp_path / "model.onnx", opset=20)


def test_a_model_in_half_precision_is_refused(tmp_path: Path) -> None:
    sim = tiny_sim(ONE_LAYER)
    sim.model.bfloat16()
    with pytest.raises(OnnxError, match=r"torch\.bfloat16; expected torch\.float32"):
        sim.export_onnx(tmp_path / "model.onnx")


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="is a folder"):
        tiny_sim(ONE_LAYER).export_onnx(tmp_path)


def test_a_failed_write_leaves_what_was_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(onnx.checker, "check_model", full)
    with pytest.raises(OSError, match="No space left"):
        exported(folder)[0].export_onnx(path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = tiny_sim(ONE_LAYER)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'quantsim\[onnx\]'"):
        sim.export_onnx(tmp_path / "model.onnx")


def test_files_of_others_are_not_compared(folder: Path, tmp_path: Path) -> None:
    sim, path = exported(folder)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "theirs.onnx")
    with pytest.raises(OnnxError, match="no 'quantsim' in its metadata"):
        compare_onnx(tmp_path / "theirs.onnx", sim.graph, other_shapes())
    with pytest.raises(OnnxError, match="the batch lacks attention_mask"):
        compare_onnx(path, sim.graph, [{"input_ids": tiny_batch()["input_ids"]}])


def test_a_file_that_is_cut_short_is_named(folder: Path, tmp_path: Path) -> None:
    _, path = exported(folder)
    (tmp_path / "short.onnx").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OnnxError, match=r"short\.onnx: cannot be read as ONNX .*Export it again"):
        read_metadata(tmp_path / "short.onnx")


def test_the_comparison_finds_a_wrong_grid(folder: Path) -> None:
    sim, path = exported(folder)
    model = onnx.load(path)
    name = "bert.encoder.layer.0.attention.self.softmax"
    scale = onnx.numpy_helper.to_array(next(x for x in model.graph.initializer if x.name == f"{name}.scale"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale * 2, "wrong"))
    next(node for node in model.graph.node if node.output[0] == f"{name}.quantized").input[1] = "wrong"
    onnx.save(model, folder / "wrong.onnx")
    parity = compare_onnx(folder / "wrong.onnx", sim.graph, other_shapes(), optimize=False)
    assert not parity.holds
    assert [edge.name for edge in parity.edges if edge.off_by_more] == [name]
    assert name in str(parity)
