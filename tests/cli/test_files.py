"""`quantsim export` and `quantsim lower`: what they write is what the library writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from model_zoo.cards import Card
from quantsim import QuantConfig, QuantSim, Rule
from quantsim.formats.onnx.runtime import open_session
from recipes.q8bert import q8bert
from tests.cli.conftest import TEXTS, Run, names_in
from tests.tiny import tiny_batch, tiny_bert, tiny_sim

# ---- lower ----


def test_an_int8_checkpoint(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    ran = run("lower", checkpoint, "--output", tmp_path / "int8", "--json")
    sim, lowered = QuantSim.from_pretrained(checkpoint), QuantSim.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(sim.model(**tiny_batch()).logits, lowered.model(**tiny_batch()).logits)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "int8")]
    assert sizes[1] < 0.7 * sizes[0]
    assert ran.json["bytes_on_disk"] > sizes[1]
    assert {edge["kernel"] for edge in ran.json["edges"]} >= {"int8 product", "table", "int8 rows"}
    assert AutoTokenizer.from_pretrained(tmp_path / "int8")(TEXTS) == AutoTokenizer.from_pretrained(checkpoint)(TEXTS)


def test_the_table_of_kernels(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    ran = run("lower", checkpoint, "--output", tmp_path / "int8")
    assert "int8 product" in ran.out
    assert f"written: {tmp_path / 'int8'}" in ran.out


def test_lower_refuses(model: Path, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert "is not quantized; expected a checkpoint" in run("lower", model, "--output", tmp_path / "x").refused()
    (tmp_path / "taken").touch()
    assert "exists already" in run("lower", checkpoint, "--output", tmp_path / "taken").refused()
    assert names_in(tmp_path) == {"taken"}


# ---- export ----


def test_onnx(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = run("export", checkpoint, "--format", "onnx", "--output", tmp_path / "model.onnx", "--json").json
    assert found["written"] == [str(tmp_path / "model.onnx")]
    assert names_in(tmp_path) == {"model.onnx"}
    sim = QuantSim.from_pretrained(checkpoint)
    assert set(found["tensors"]) == set(sim.quantizers)
    session = open_session(tmp_path / "model.onnx")
    with torch.no_grad():
        expected = sim.model(**tiny_batch()).logits
    (actual,) = session.run(["logits"], {name: x.numpy() for name, x in tiny_batch().items()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_integers(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sim = tiny_sim(config="ibert")
    sim.save_pretrained(tmp_path / "checkpoint")
    found = run("export", tmp_path / "checkpoint", "--format", "integers", "--output", tmp_path / "model.onnx", "--json").json
    assert found["written"] == [str(tmp_path / "model.onnx")]
    (actual,) = open_session(tmp_path / "model.onnx").run(["logits"], {name: x.numpy() for name, x in tiny_batch().items()})
    assert torch.equal(torch.from_numpy(actual), sim.integer_only().model(**tiny_batch()).logits)


def test_encodings_by_module(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    found = run("export", checkpoint, "--format", "aimet", "--output", tmp_path / "cli.encodings", "--json").json
    left_out = QuantSim.from_pretrained(checkpoint).export_aimet_encodings(tmp_path / "library.encodings")
    assert found["left_out"] == left_out
    assert (tmp_path / "cli.encodings").read_text() == (tmp_path / "library.encodings").read_text()


def test_encodings_by_tensor_come_with_their_model(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    flags = ["--format", "aimet", "--encodings", "1.0.0", "--output", tmp_path / "bert.encodings", "--json"]
    found = run("export", checkpoint, *flags).json
    assert names_in(tmp_path) == {"bert.encodings", "bert.onnx"}
    assert found["written"] == [str(tmp_path / "bert.encodings"), str(tmp_path / "bert.onnx")]
    graph = onnx.load(tmp_path / "bert.onnx").graph
    tensors = {x.name for x in graph.initializer} | {name for node in graph.node for name in node.output} | {x.name for x in graph.input}
    encodings = json.loads((tmp_path / "bert.encodings").read_text())
    named = {entry["name"] for part in ("activation_encodings", "param_encodings") for entry in encodings[part]}
    assert named
    assert named <= tensors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "aimet", "--bias", "int32"], "--bias int32: means nothing with --format aimet"),
        (["--format", "aimet", "--single-operators"], "--single-operators: means nothing with --format aimet; leave it out"),
        (["--format", "onnx", "--encodings", "1.0.0"], "--encodings 1.0.0: means nothing with --format onnx"),
        (["--format", "integers", "--opset", "21"], "--opset 21: means nothing with --format integers"),
        (["--format", "onnx", "--opset", "9"], "opset"),
        (["--format", "aimet", "--encodings", "2.0"], "no version of encodings '2.0' (nearest: 2.0.0)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_refuses(flags: list[str], message: str, checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert message in run("export", checkpoint, "--output", tmp_path / "x", *flags).refused()
    assert names_in(tmp_path) == set()


def test_files_that_are_there(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "x.encodings"
    path.write_text("precious")
    command = ["export", checkpoint, "--format", "aimet", "--output", path]
    assert "exists already" in run(*command).refused()
    assert path.read_text() == "precious"
    assert run(*command, "--overwrite").code == 0
    assert "activation_encodings" in path.read_text()
    (tmp_path / "y.onnx").touch()
    by_tensor = ["--format", "aimet", "--encodings", "1.0.0", "--output"]
    assert f"--output {tmp_path / 'y.onnx'}: exists already" in run("export", checkpoint, *by_tensor, tmp_path / "y.encodings").refused()
    assert "the model goes beside it" in run("export", checkpoint, *by_tensor, tmp_path / "z.onnx").refused()


def test_a_card_is_a_checkpoint_too(bundle: Card, tmp_path: Path, run: Run) -> None:
    assert run("export", bundle.folder, "--format", "aimet", "--output", tmp_path / "x.encodings").code == 0


def test_a_model_without_integers_is_the_users_and_no_mistake_of_the_program(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    """The preset aimet has edges that no integer graph takes."""
    sim = QuantSim(tiny_bert(), QuantConfig.preset("aimet").with_rules(Rule(role="activation", set={"bits": 16})))
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path / "wide")
    assert "8" in run("export", tmp_path / "wide", "--format", "integers", "--output", tmp_path / "x.onnx").refused()
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("format", ["onnx", "aimet"])
def test_ranges_that_each_tensor_brings_along_have_no_place_in_a_file(format: str, tmp_path: Path, run: Run) -> None:
    sim = QuantSim(tiny_bert(), q8bert("dynamic"))
    sim.model(**tiny_batch())
    sim.model.eval()
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path / "dynamic")
    ran = run("export", tmp_path / "dynamic", "--format", format, "--output", tmp_path / "x", "--json")
    if format == "onnx":
        assert ran.code == 2
        assert "each tensor's own (dynamic)" in ran.out + ran.err
        assert not (tmp_path / "x").exists()
    else:
        left_out = sim.export_aimet_encodings(tmp_path / "y")
        assert sum("dynamic" in reason for reason in left_out.values()) > 3
