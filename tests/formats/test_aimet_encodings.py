"""AIMET encodings files: four layouts, each a round trip to the bit, and refused whole where a value means nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from quantsim import EncodingsError, FakeQuantizer, QuantConfig, QuantSim, Rule, State
from quantsim.formats import aimet_encodings
from quantsim.formats.aimet_encodings import CALLED_TWICE, NO_MODULE, NOT_CALIBRATED
from tests.tiny import tiny_batch, tiny_config, tiny_sim

VERSIONS = ["torch", "0.6.1", "1.0.0", "2.0.0"]
ONNX = VERSIONS[1:]
MIXED = QuantConfig.preset("aimet").with_rules(
    Rule(op="gelu", set={"bits": 4}),
    Rule(op="softmax", set={"bits": 16}),
    Rule(module="*.query.output", set={"symmetric": True}),
    Rule(module="*.key.output", set={"symmetric": True, "bits": 16}),
    Rule(module="*.value.output", set={"axis": -1}),
    Rule(module="*.intermediate.dense.weight", set={"bits": 4}),
    Rule(module="*.output.dense.weight", set={"symmetric": False, "learn": False}),
    Rule(module="bert.pooler.dense.weight", set={"bits": 16, "symmetric": False}),
)


def bits_of(quantizer: FakeQuantizer) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        params = quantizer.affine_params()
    return params.scale.flatten().tolist(), params.zero_point.flatten().tolist()


def snapshot(sim: QuantSim) -> dict[str, tuple[State, list[float], list[float]]]:
    return {name: (q.state, q.min.flatten().tolist(), q.max.flatten().tolist()) for name, q in sim.quantizers.items()}


@torch.no_grad()
def logits(sim: QuantSim) -> Tensor:
    return sim.model.eval()(**tiny_batch(seed=3)).logits


# ---- round trips ----


@pytest.mark.parametrize("version", VERSIONS)
def test_scale_and_zero_point_come_back_to_the_bit(version: str, tmp_path: Path) -> None:
    """Per channel and per tensor, symmetric and not, 4, 8 and 16 bits; ranges in between keep every other quantizer's bit too."""
    sim, new = tiny_sim(config=MIXED), tiny_sim(config=MIXED, calibrated=False)
    left_out = sim.export_aimet_encodings(tmp_path / "e.json", version)
    read = new.load_aimet_encodings(tmp_path / "e.json")
    assert set(read.loaded) == set(sim.quantizers) - set(left_out)
    assert (read.missing, read.unknown, read.inexact) == ((), (), ())
    for name in read.loaded:
        ours, theirs = sim.quantizers[name], new.quantizers[name]
        assert bits_of(theirs) == bits_of(ours), name
        assert theirs.state is (State.LEARNING if theirs.spec.learn else State.FIXED), name
    assert {new.quantizers[name].state for name in left_out} <= {State.OFF}
    if version != "torch":
        assert torch.equal(logits(new), logits(sim))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_second_export_is_the_same_file(version: str, tmp_path: Path) -> None:
    sim, new = tiny_sim(config=MIXED), tiny_sim(config=MIXED, calibrated=False)
    sim.export_aimet_encodings(tmp_path / "a.json", version)
    new.load_aimet_encodings(tmp_path / "a.json")
    new.export_aimet_encodings(tmp_path / "b.json", version)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_ranges_that_training_moved_come_back(tmp_path: Path) -> None:
    sim, new = tiny_sim(), tiny_sim(calibrated=False)
    sim.model(**tiny_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    torch.optim.SGD(sim.range_parameters(), lr=0.3).step()
    sim.export_aimet_encodings(tmp_path / "e.json", "2.0.0")
    new.load_aimet_encodings(tmp_path / "e.json")
    assert torch.equal(logits(new), logits(sim))


@pytest.mark.parametrize("version", ONNX)
def test_tensor_names_are_written_and_read(version: str, tmp_path: Path) -> None:
    sim, new = tiny_sim(), tiny_sim(calibrated=False)
    names = {"classifier.output": "logits_QuantizeLinear_Input", "classifier.weight": "onnx::MatMul_7"}
    sim.export_aimet_encodings(tmp_path / "e.json", version, tensor_names=names)
    text = (tmp_path / "e.json").read_text()
    assert all(name in text for name in names.values())
    assert "classifier" not in text
    new.load_aimet_encodings(tmp_path / "e.json", tensor_names=names)
    assert torch.equal(logits(new), logits(sim))
    with pytest.raises(EncodingsError, match=r"e\.json: \S+(logits_|MatMul_7)\S* and 1 more belong to no quantizer"):
        new.load_aimet_encodings(tmp_path / "e.json")


# ---- what goes where in the torch-side file ----


def test_what_the_torch_side_file_leaves_out_is_named(tmp_path: Path) -> None:
    left_out = tiny_sim().export_aimet_encodings(tmp_path / "e.json")
    inside = [f"bert.encoder.layer.{i}.attention.self.{op}" for i in range(2) for op in ("matmul", "mul", "add", "softmax", "matmul_1")]
    assert left_out == dict.fromkeys(["bert.embeddings.add", *inside], NO_MODULE)


def test_a_residual_add_is_the_input_of_its_layer_norm(tmp_path: Path) -> None:
    sim = tiny_sim()
    sim.export_aimet_encodings(tmp_path / "e.json")
    modules = json.loads((tmp_path / "e.json").read_text())["activation_encodings"]
    inputs = {name: entry["input"] for name, entry in modules.items() if "input" in entry}
    sums = {
        "bert.embeddings": "add_1",
        **{f"bert.encoder.layer.{i}.{part}": "add" for i in range(2) for part in ("attention.output", "output")},
    }
    assert inputs.keys() == {f"{module}.LayerNorm" for module in sums}
    for module, op in sums.items():
        assert [inputs[f"{module}.LayerNorm"]["0"]["scale"]] == bits_of(sim.quantizers[f"{module}.{op}"])[0]


class Twice(PreTrainedModel):
    """A module that is called twice, between a float input and a head."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dense, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.dense(self.dense(features)))


def test_a_module_that_is_called_twice_is_left_out(tmp_path: Path) -> None:
    sim = QuantSim(Twice(tiny_config()).eval(), QuantConfig(), {"features": torch.randn(2, 16)})
    sim.compute_encodings([{"features": torch.randn(4, 16)}])
    left_out = sim.export_aimet_encodings(tmp_path / "e.json")
    assert left_out == {"features": NO_MODULE, "dense.output": CALLED_TWICE, "dense.output_1": CALLED_TWICE}
    assert sim.load_aimet_encodings(tmp_path / "e.json").left_out == left_out


class Once(Twice):
    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)


def test_an_input_of_the_model_is_the_input_of_the_module_that_takes_it(tmp_path: Path) -> None:
    sim = QuantSim(Once(tiny_config()).eval(), QuantConfig(), {"features": torch.randn(2, 16)})
    sim.compute_encodings([{"features": torch.randn(4, 16)}])
    assert not sim.export_aimet_encodings(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["activation_encodings"]["head"].keys() == {"input", "output"}


def test_a_tied_weight_has_a_field_for_each_of_its_names(tmp_path: Path) -> None:
    sim = tiny_sim("BertForMaskedLM")
    assert isinstance(sim.model, BertForMaskedLM)
    sim.export_aimet_encodings(tmp_path / "e.json")
    values = json.loads((tmp_path / "e.json").read_text())
    params = values["param_encodings"]
    names = ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    assert params[names[0]] == params[names[1]]
    new = tiny_sim("BertForMaskedLM", calibrated=False)
    write(tmp_path, values | {"param_encodings": {name: x for name, x in params.items() if name != names[1]}})
    assert not new.load_aimet_encodings(tmp_path / "e.json").missing
    for body in params[names[1]]:
        body.update({key: 2 * body[key] for key in ("min", "max", "scale")})
    write(tmp_path, values)
    with pytest.raises(EncodingsError, match=r"word_embeddings\.weight is another range than param_encodings\.\S+|is another range than"):
        new.load_aimet_encodings(tmp_path / "e.json")


# ---- the layouts, written out ----

HAND = QuantConfig.preset("aimet").with_rules(
    Rule(module="*", enabled=False, reason="not part of this test"),
    Rule(module="classifier.*", enabled=True),
    Rule(module="bert.embeddings.LayerNorm.weight", enabled=True, set={"bits": 4, "symmetric": False, "axis": None}),
    Rule(module="bert.embeddings.add_1", enabled=True, set={"bits": 16}),
)


def by_hand() -> QuantSim:
    """Ranges whose ends, scales and zero points are exact: every scale is a power of 2."""
    sim = tiny_sim(config=HAND, calibrated=False)
    for name, low, high in (
        ("bert.embeddings.add_1", [-16384.0], [49151.0]),
        ("bert.embeddings.LayerNorm.weight", [0.0], [3.75]),
        ("classifier.weight", [-64.0, -32.0], [63.5, 31.75]),
        ("classifier.output", [-8.0], [23.875]),
    ):
        quantizer = sim.quantizers[name]
        quantizer.set_range(torch.tensor(low).reshape(quantizer.min.shape), torch.tensor(high).reshape(quantizer.max.shape))
    return sim


@cache
def untouched() -> QuantSim:
    """One that no test changes: each load into it is refused."""
    return by_hand()


def body(low: float, high: float, scale: float, offset: int, symmetric: str = "False", bits: int = 8) -> dict[str, Any]:
    return {"min": low, "max": high, "scale": scale, "offset": offset, "bitwidth": bits, "dtype": "int", "is_symmetric": symmetric}


ADD = body(-16384.0, 49151.0, 1.0, -16384, bits=16)
GAMMA = body(0.0, 3.75, 0.25, 0, bits=4)
WEIGHT = [body(-64.0, 63.5, 0.5, -128, "True"), body(-32.0, 31.75, 0.25, -128, "True")]
LOGITS = body(-8.0, 23.875, 0.125, -64)
EXPECTED: dict[str, dict[str, Any]] = {
    "torch": {
        "activation_encodings": {"bert.embeddings.LayerNorm": {"input": {"0": ADD}}, "classifier": {"output": {"0": LOGITS}}},
        "param_encodings": {"bert.embeddings.LayerNorm.weight": [GAMMA], "classifier.weight": WEIGHT},
    },
    "0.6.1": {
        "version": "0.6.1",
        "activation_encodings": {"bert.embeddings.add_1": [ADD], "classifier.output": [LOGITS]},
        "param_encodings": {"bert.embeddings.LayerNorm.weight": [GAMMA], "classifier.weight": WEIGHT},
    },
    "1.0.0": {
        "version": "1.0.0",
        "activation_encodings": [
            {
                "name": "bert.embeddings.add_1",
                "dtype": "INT",
                "bw": 16,
                "is_sym": False,
                "scale": [1.0],
                "offset": [-16384],
                "enc_type": "PER_TENSOR",
            },
            {
                "name": "classifier.output",
                "dtype": "INT",
                "bw": 8,
                "is_sym": False,
                "scale": [0.125],
                "offset": [-64],
                "enc_type": "PER_TENSOR",
            },
        ],
        "param_encodings": [
            {
                "name": "bert.embeddings.LayerNorm.weight",
                "dtype": "INT",
                "bw": 4,
                "is_sym": False,
                "scale": [0.25],
                "offset": [0],
                "enc_type": "PER_TENSOR",
            },
            {
                "name": "classifier.weight",
                "dtype": "INT",
                "bw": 8,
                "is_sym": True,
                "scale": [0.5, 0.25],
                "offset": [-128, -128],
                "enc_type": "PER_CHANNEL",
            },
        ],
    },
    "2.0.0": {
        "version": "2.0.0",
        "encodings": [
            {"name": "bert.embeddings.add_1", "output_dtype": "uint16", "y_scale": 1.0, "y_zero_point": 16384},
            {"name": "bert.embeddings.LayerNorm.weight", "output_dtype": "uint4", "y_scale": 0.25},
            {"name": "classifier.weight", "output_dtype": "int8", "y_scale": [0.5, 0.25], "axis": 0},
            {"name": "classifier.output", "output_dtype": "uint8", "y_scale": 0.125, "y_zero_point": 64},
        ],
    },
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_layout(version: str, tmp_path: Path) -> None:
    by_hand().export_aimet_encodings(tmp_path / "e.json", version)
    values = json.loads((tmp_path / "e.json").read_text())
    producer = values.pop("producer", None)
    assert (producer is None) == (version == "torch")
    assert typed(values) == typed(EXPECTED[version])


def typed(value: Any) -> Any:
    """With the types told apart that ``==`` does not: ``1``, ``1.0`` and ``True``."""
    if isinstance(value, dict):
        return {key: typed(x) for key, x in value.items()}
    return [typed(x) for x in value] if isinstance(value, list) else (type(value).__name__, value)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_written_by_hand_is_read(version: str, tmp_path: Path) -> None:
    sim = tiny_sim(config=HAND, calibrated=False)
    write(tmp_path, EXPECTED[version])
    assert set(sim.load_aimet_encodings(tmp_path / "e.json").loaded) == set(sim.quantizers)
    assert snapshot(sim) == snapshot(by_hand())


@pytest.mark.parametrize("version", ["torch", "0.6.1"])
def test_min_and_max_alone_will_do(version: str, tmp_path: Path) -> None:
    """What AIMET reads of an entry; scale and offset follow."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(x) for key, x in value.items() if key not in ("scale", "offset", "dtype")}
        return [strip(x) for x in value] if isinstance(value, list) else value

    sim = tiny_sim(config=HAND, calibrated=False)
    write(tmp_path, strip(EXPECTED[version]))
    sim.load_aimet_encodings(tmp_path / "e.json")
    assert snapshot(sim) == snapshot(by_hand())


def test_what_aimet_exports_beside_is_read_by_its_sections(tmp_path: Path) -> None:
    """``sim.export`` of aimet-torch stamps the torch-side file with the ONNX-side version."""
    about = {"producer": {"package": "aimet-torch"}, "excluded_layers": [], "quantizer_args": {"param_bitwidth": 8}}
    for version in ("0.6.1", "1.0.0"):
        sim = tiny_sim(config=HAND, calibrated=False)
        write(tmp_path, EXPECTED["torch"] | about | {"version": version})
        sim.load_aimet_encodings(tmp_path / "e.json")
        assert snapshot(sim) == snapshot(by_hand())


def test_a_scale_that_float32_ranges_skip_is_reported(tmp_path: Path) -> None:
    sim = tiny_sim(config=HAND, calibrated=False)
    values = copy.deepcopy(EXPECTED["2.0.0"])
    gamma = next(entry for entry in values["encodings"] if entry["output_dtype"] == "uint4")
    gamma["y_scale"] = next(scale for i in range(64) if (scale := 0.375 + i * 2.0**-25) and not gives(scale))
    write(tmp_path, values)
    assert sim.load_aimet_encodings(tmp_path / "e.json").inexact == ("bert.embeddings.LayerNorm.weight",)


def gives(scale: float) -> bool:
    """Some float32 width is 15 of these scales to the bit."""
    width = torch.tensor(15 * scale)
    around = [width, torch.nextafter(width, torch.tensor(0.0)), torch.nextafter(width, torch.tensor(99.0))]
    return any((x / 15).item() == scale for x in around)


# ---- strict and not ----


def write(folder: Path, values: Any) -> Path:
    path = folder / "e.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def without(version: str, name: str) -> dict[str, Any]:
    """The expected file without one name's entries."""
    values = copy.deepcopy(EXPECTED[version])
    for section, entries in values.items():
        if isinstance(entries, dict):
            entries.pop(name, None)
        elif isinstance(entries, list):
            values[section] = [entry for entry in entries if entry["name"] != name]
    return values


@pytest.mark.parametrize("version", VERSIONS)
def test_a_missing_name(version: str, tmp_path: Path) -> None:
    sim = tiny_sim(config=HAND, calibrated=False)
    path = write(tmp_path, without(version, "classifier.weight"))
    refused(sim, path, r"e\.json: \w+\.classifier\.weight is missing; expected .*strict=False")
    read = sim.load_aimet_encodings(path, strict=False)
    assert read.missing == ("classifier.weight",)
    assert len(read.loaded) == len(sim.quantizers) - 1
    assert sim.quantizers["classifier.weight"].state is State.OFF
    assert sim.quantizers["classifier.output"].calibrated


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_name(version: str, tmp_path: Path) -> None:
    sim = tiny_sim(config=HAND, calibrated=False)
    values = json.loads(json.dumps(EXPECTED[version]).replace('"classifier.weight"', '"clasifier.weight"'))
    path = write(tmp_path, values)
    refused(sim, path, r"e\.json: \w+\.clasifier\.weight belongs to no quantizer here \(nearest: \w+\.classifier\.weight")
    read = sim.load_aimet_encodings(path, strict=False)
    assert [name.split(".", 1)[1] for name in read.unknown] == ["clasifier.weight"]
    assert read.missing == ("classifier.weight",)


# ---- refusals ----


def refused(sim: QuantSim, path: Path, message: str, strict: bool = True) -> None:
    before = snapshot(sim)
    with pytest.raises(EncodingsError, match=rf"(?s){message}"):
        sim.load_aimet_encodings(path, strict=strict)
    assert snapshot(sim) == before


def at(values: Any, *keys: str | int) -> Any:
    for key in keys:
        values = values[key]
    return values


def change(*keys: str | int, **changes: Any) -> Callable[[Any], None]:
    return lambda values: at(values, *keys).update(changes)


LOGITS_AT = ("activation_encodings", "classifier", "output", "0")
NAME = r"activation_encodings\.classifier\.output\.0"
WEIGHT_NAME = r"param_encodings\.classifier\.weight"
BROKEN: list[tuple[str, Callable[[Any], Any], str]] = [
    ("torch", change(*LOGITS_AT, min="-8"), rf"{NAME}\.min is '-8'; expected a finite number"),
    ("torch", change(*LOGITS_AT, min=True), rf"{NAME}\.min is True; expected a finite number"),
    ("torch", change(*LOGITS_AT, max=10**400), rf"{NAME}\.max is 1000\S+; expected a finite number"),
    ("torch", change(*LOGITS_AT, max=1e39, scale=1e39 / 255, offset=0), rf"{NAME} is .*; expected a range that float32 can hold"),
    ("torch", change(*LOGITS_AT, min=24.0), rf"{NAME}\.min is 24\.0; expected at most max, which is 23\.875"),
    ("torch", change(*LOGITS_AT, min=1.0), rf"{NAME}\.min is 1\.0; expected a range that holds 0"),
    ("torch", change(*LOGITS_AT, scale=0.25), rf"{NAME}\.scale is 0\.25; expected \(max - min\) / 255, which is 0\.125"),
    ("torch", change(*LOGITS_AT, scale=0), rf"{NAME}\.scale is 0; expected a finite number above 0"),
    ("torch", change(*LOGITS_AT, offset=-65), rf"{NAME}\.offset is -65; expected min / scale .* which is -64"),
    ("torch", change(*LOGITS_AT, offset=64), rf"{NAME}\.offset is 64; expected an integer from -255 to 0"),
    ("torch", change(*LOGITS_AT, offset=-64.5), rf"{NAME}\.offset is -64\.5; expected an integer"),
    ("torch", change(*LOGITS_AT, bitwidth=32), rf"{NAME}\.bitwidth is 32; expected an integer from 2 to 16"),
    ("torch", change(*LOGITS_AT, dtype="float"), rf'{NAME}\.dtype is .float.; expected "int"'),
    ("torch", change(*LOGITS_AT, is_symmetric=False), rf'{NAME}\.is_symmetric is False; expected "True" or "False"'),
    ("torch", change(*LOGITS_AT, zero_point_shift=0.5), rf"{NAME}\.zero_point_shift is 0\.5; expected no such field"),
    ("torch", lambda v: at(v, *LOGITS_AT).pop("max"), rf"{NAME} is .*missing max"),
    ("torch", lambda v: at(v, *LOGITS_AT[:-1]).update({"0": []}), rf"{NAME} is \[\]; expected a list with at least one"),
    ("torch", lambda v: at(v, *LOGITS_AT[:-1]).update({"0": [LOGITS] * 2}), rf"{NAME} has 2 ranges; expected one range per tensor"),
    ("torch", change("activation_encodings", "classifier", outputs={}), r"classifier\.outputs is \{\}; expected no such field"),
    ("torch", lambda v: v.update(activation_encodings={"classifier": 3}), r"activation_encodings\.classifier is 3; expected an object"),
    ("torch", lambda v: v["param_encodings"]["classifier.weight"].pop(), rf"{WEIGHT_NAME} has 1 ranges; expected .* each of 2 channels"),
    ("torch", lambda v: v["param_encodings"].update({"classifier.weight": WEIGHT[0]}), rf"{WEIGHT_NAME} is .*; expected a list"),
    ("torch", change("param_encodings", "classifier.weight", 1, offset=0), rf"{WEIGHT_NAME}\.1\.offset is 0; expected -128"),
    ("torch", change("param_encodings", "classifier.weight", 1, bitwidth=4), rf"{WEIGHT_NAME}\.1\.(bitwidth|scale|offset) is"),
    ("torch", lambda v: v.update(extra={}), r"extra is \{\}; expected no such field"),
    ("torch", lambda v: v.update(version="3.0"), r'version is .3\.0.; expected "0\.6\.1" or "1\.0\.0" or "2\.0\.0"'),
    ("0.6.1", lambda v: v["activation_encodings"].update({"classifier.output": []}), r"classifier\.output is \[\]; expected a list"),
    ("0.6.1", lambda v: v.update(param_encodings=7), r"param_encodings is 7; expected an object"),
    ("1.0.0", change("param_encodings", 1, scale=[0.5]), rf"{WEIGHT_NAME}\.offset is \[-128, -128\]; expected as many as scale has: 1"),
    ("1.0.0", change("param_encodings", 1, scale=[0.5, -1]), rf"{WEIGHT_NAME}\.scale\.1 is -1; expected a finite number above 0"),
    ("1.0.0", change("param_encodings", 1, offset=[-128, -127]), rf"{WEIGHT_NAME}\.offset\.1 is -127; expected -128"),
    ("1.0.0", change("param_encodings", 1, enc_type="PER_TENSOR"), rf"{WEIGHT_NAME}\.scale is .*; expected one value"),
    ("1.0.0", change("param_encodings", 1, enc_type="LPBQ"), rf'{WEIGHT_NAME}\.enc_type is .LPBQ.; expected "PER_TENSOR" or "PER_CH'),
    ("1.0.0", change("param_encodings", 1, is_sym="True"), rf"{WEIGHT_NAME}\.is_sym is .True.; expected true or false"),
    (
        "1.0.0",
        change("param_encodings", 1, name="bert.embeddings.LayerNorm.weight"),
        r"param_encodings\.1\.name is .*; expected each name once",
    ),
    ("1.0.0", change("param_encodings", 1, name=""), r"param_encodings\.1\.name is ''; expected text"),
    ("1.0.0", lambda v: v.update(activation_encodings={}), r"activation_encodings is \{\}; expected a list"),
    ("1.0.0", lambda v: v.update(version="0.6.1"), r"version is .0\.6\.1.; expected .1\.0\.0."),
    ("2.0.0", lambda v: v.update(version="1.0.0"), r"version is .1\.0\.0.; expected .2\.0\.0."),
    ("2.0.0", lambda v: v.update(encodings=None), r"encodings is None; expected a list"),
    ("2.0.0", lambda v: v["encodings"].append(3), r"encodings\.4 is 3; expected an object"),
    (
        "2.0.0",
        change("encodings", 2, output_dtype="int32"),
        r"weight\.output_dtype is .int32.; expected int or uint and 2 to 16",
    ),
    ("2.0.0", change("encodings", 2, output_dtype=8), r"classifier\.weight\.output_dtype is 8; expected int or uint"),
    ("2.0.0", change("encodings", 2, axis=1), r"classifier\.weight has axis 1; expected 0"),
    ("2.0.0", change("encodings", 2, y_zero_point=[0, 1]), r"classifier\.weight\.y_zero_point\.1 is 1; expected 0"),
    ("2.0.0", change("encodings", 2, y_zero_point=[0]), r"classifier\.weight\.y_zero_point is \[0\]; expected as many as y_scale has: 2"),
    ("2.0.0", change("encodings", 2, block_size=2), r"classifier\.weight\.block_size is 2; expected no such field"),
    ("2.0.0", lambda v: at(v, "encodings", 2).pop("axis"), r"classifier\.weight\.y_scale is .*; expected a number, for there is no axis"),
    ("2.0.0", change("encodings", 3, y_zero_point=256), r"classifier\.output\.y_zero_point is 256; expected an integer from 0 to 255"),
    ("2.0.0", change("encodings", 3, y_scale=1e-44, y_zero_point=9), r"classifier\.output cannot be held by a range in torch\.float32"),
    ("2.0.0", change("encodings", 3, y_scale=1e300), r"classifier\.output is .*; expected a range that float32 can hold"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("version, edit, message", BROKEN, ids=[f"{v}-{m[-40:]}" for v, _, m in BROKEN])
def test_a_broken_value_is_refused_with_file_field_and_expectation(
    version: str, edit: Callable[[Any], Any], message: str, strict: bool, tmp_path: Path
) -> None:
    values = copy.deepcopy(EXPECTED[version])
    edit(values)
    refused(untouched(), write(tmp_path, values), rf"e\.json: .*{message}", strict)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "the file is .*; expected an object"),
        ("{}", "the file is .*; expected an object with activation_encodings"),
        ('{"encodings": [], "encodings": []}', r"not readable as JSON \(the key 'encodings' is there twice"),
        ('{"param_encodings": {"a": [{"min": NaN}]}}', r"not readable as JSON \(NaN is no JSON number"),
        ('{"param_encodings": {"a": [{"min": -Infinity}]}}', r"not readable as JSON \(-Infinity is no JSON number"),
    ],
    ids=lambda x: x[:20],
)
def test_a_file_that_is_no_such_json(text: str, message: str, tmp_path: Path) -> None:
    refused(untouched(), write(tmp_path, text), rf"e\.json: {message}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(untouched(), tmp_path / "none.json", r"none\.json: no such file")
    refused(untouched(), tmp_path, r"not readable as JSON")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "rule, message",
    [
        (
            Rule(module="classifier.output", set={"bits": 4}),
            r"classifier\.output\S* is 8-bit asymmetric; bits .* expected 4-bit",
        ),
        (Rule(module="classifier.output", set={"symmetric": True}), r"is 8-bit asymmetric; symmetry .* expected 8-bit symmetric"),
        (Rule(module="classifier.weight", set={"axis": None}), r"classifier\.weight has 2 ranges; expected one range per tensor"),
        (Rule(module="classifier.weight", set={"axis": 1}), r"classifier\.weight has 2 ranges; expected .* 16 channels \(axis 1\)"),
    ],
    ids=["bits", "symmetry", "per tensor", "other axis"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_another_spec_is_refused(version: str, rule: Rule, message: str, strict: bool, tmp_path: Path) -> None:
    write(tmp_path, EXPECTED[version])
    refused(tiny_sim(config=HAND.with_rules(rule), calibrated=False), tmp_path / "e.json", rf"e\.json: .*{message}", strict)


def test_a_mask_that_was_never_clamped_is_refused(tmp_path: Path) -> None:
    sim = tiny_sim()
    name = "bert.encoder.layer.0.attention.self.add"
    sim.export_aimet_encodings(tmp_path / "e.json", "2.0.0")
    values = json.loads((tmp_path / "e.json").read_text())
    next(entry for entry in values["encodings"] if entry["name"] == name).update(y_scale=1e36, y_zero_point=255)
    refused(sim, write(tmp_path, values), rf"e\.json: encodings\.{name}: .*mask")


# ---- an export that is refused or fails ----


def test_an_export_without_ranges(tmp_path: Path) -> None:
    with pytest.raises(EncodingsError, match=r"e\.json: none of 60 quantizers has a range; call compute_encodings"):
        tiny_sim(calibrated=False).export_aimet_encodings(tmp_path / "e.json")
    assert not list(tmp_path.iterdir())


def test_an_export_during_calibration(tmp_path: Path) -> None:
    sim = tiny_sim()
    sim.quantizers["classifier.output"].state = State.ESTIMATING
    with pytest.raises(EncodingsError, match=r"classifier\.output is being calibrated"):
        sim.export_aimet_encodings(tmp_path / "e.json")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_quantizer_that_is_off_is_left_out_and_named(version: str, tmp_path: Path) -> None:
    sim = by_hand()
    sim.quantizers["classifier.output"].state = State.OFF
    assert sim.export_aimet_encodings(tmp_path / "e.json", version) == {"classifier.output": NOT_CALIBRATED}
    assert "classifier.output" not in (tmp_path / "e.json").read_text()
    assert sim.load_aimet_encodings(tmp_path / "e.json", strict=False).missing == ("classifier.output",)


@pytest.mark.parametrize(
    "version, names, message",
    [
        ("3.0.0", None, "version is '3.0.0'; expected one of torch, 0.6.1, 1.0.0, 2.0.0"),
        ("torch", {"classifier.output": "logits"}, "tensor_names: the torch-side file has .* no tensors"),
        ("1.0.0", {"clasifier.output": "logits"}, r"tensor_names: 'clasifier\.output' has no quantizer \(nearest: classifier\.output"),
        (
            "1.0.0",
            {"classifier.output": "classifier.weight"},
            r"'classifier\.weight' stands for classifier\.weight and for class",
        ),
    ],
)
def test_arguments_that_mean_nothing(version: str, names: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(EncodingsError, match=message):
        by_hand().export_aimet_encodings(tmp_path / "e.json", version, tensor_names=names)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(EncodingsError, match="is a folder; expected the path of a file"):
        by_hand().export_aimet_encodings(tmp_path)


def test_a_failed_export_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "e.json"
    by_hand().export_aimet_encodings(path)
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(aimet_encodings.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_sim().export_aimet_encodings(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["e.json"]


def test_the_model_is_what_it_was(tmp_path: Path) -> None:
    sim = tiny_sim()
    before = snapshot(sim)
    sim.export_aimet_encodings(tmp_path / "e.json")
    assert snapshot(sim) == before
    assert torch.equal(logits(sim), logits(tiny_sim()))
