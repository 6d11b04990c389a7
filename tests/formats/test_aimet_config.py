"""AIMET's config JSON, written here after METHODS section 1 (the zoo's ``default_config.json``)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from quantsim import ConfigError, QuantConfig, QuantSim, clamp_mask, place
from quantsim.formats.aimet_config import is_aimet_config, read_aimet_config
from quantsim.sim import resolve_config
from tests.tiny import tiny_batch, tiny_bert, tiny_graph

OFF = {"is_output_quantized": "False"}
ZOO: dict[str, Any] = {
    "defaults": {
        "ops": {"is_output_quantized": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "unsigned_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {
        **dict.fromkeys(["Cast", "Dropout", "Expand", "Squeeze", "Pad", "Mean", "Gather"], OFF),
        "LayerNormalization": {"per_channel_quantization": "False", "params": {"weight": {"is_symmetric": "False"}}},
    },
    "supergroups": [],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def changed(*path: str, to: Any) -> dict[str, Any]:
    values = copy.deepcopy(ZOO)
    section = values
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = to
    return values


@pytest.fixture
def write(tmp_path: Path):
    def write(values: Any) -> Path:
        path = tmp_path / "zoo.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return write


def placed(config: QuantConfig) -> list[tuple[str, object]]:
    graph = tiny_graph()
    if config.mask_clamp is not None:
        clamp_mask(graph, config.mask_clamp)
    return [(p.name, p.spec) for p in place(graph, config)]


def test_the_zoos_config_is_the_preset_aimet(write) -> None:
    assert placed(read_aimet_config(write(ZOO))) == placed(QuantConfig.preset("aimet"))


def test_the_clamp_is_the_zoos(write) -> None:
    assert read_aimet_config(write(ZOO)).mask_clamp == -6.0


def test_without_per_channel_it_is_the_preset_per_tensor(write) -> None:
    values = changed("defaults", "per_channel_quantization", to="False")
    values["op_type"].pop("LayerNormalization")
    assert placed(read_aimet_config(write(values))) == placed(QuantConfig.preset("aimet_per_tensor"))


def test_quantsim_takes_the_path(write) -> None:
    path = write(ZOO)
    assert is_aimet_config(path)
    assert resolve_config(str(path)) == read_aimet_config(path)
    sim = QuantSim(tiny_bert(num_hidden_layers=1), path)
    sim.compute_encodings([tiny_batch()])
    assert "zoo" in repr(sim)


def test_our_own_json_is_no_aimet_config(write) -> None:
    path = write(QuantConfig.preset("aimet").to_dict())
    assert not is_aimet_config(path)
    assert resolve_config(path).rules == QuantConfig.preset("aimet").rules


@pytest.mark.parametrize("spelling", [("True", "False"), (True, False)], ids=["strings", "booleans"])
def test_booleans_may_be_strings(write, spelling: tuple[object, object]) -> None:
    text = json.dumps(ZOO)
    yes, no = (json.dumps(value) for value in spelling)
    assert placed(read_aimet_config(write(text.replace('"True"', yes).replace('"False"', no)))) == placed(read_aimet_config(write(ZOO)))


def specs(config: QuantConfig) -> dict[str, object]:
    return dict(placed(config))


def test_an_op_is_switched_off(write) -> None:
    found = specs(read_aimet_config(write(changed("op_type", "Softmax", to=OFF))))
    assert [spec for name, spec in found.items() if name.endswith("softmax")] == [None, None]
    assert found["classifier.output"] is not None


def test_params_are_switched_off_for_one_op(write) -> None:
    found = specs(read_aimet_config(write(changed("op_type", "Gemm", to={"params": {"weight": {"is_quantized": "False"}}}))))
    assert found["classifier.weight"] is None
    assert found["bert.embeddings.word_embeddings.weight"] is not None


@pytest.mark.parametrize(("key", "kept"), [("params", "classifier.output"), ("ops", "classifier.weight")])
def test_what_the_defaults_do_not_quantize_is_not(write, key: str, kept: str) -> None:
    found = specs(read_aimet_config(write(changed("defaults", key, to={}))))
    assert found[kept] is not None
    other = {"classifier.output": "classifier.weight", "classifier.weight": "classifier.output"}[kept]
    assert found[other] is None


def test_an_op_is_switched_on_where_the_defaults_are_off(write) -> None:
    values = changed("defaults", "ops", to={})
    values["op_type"]["Softmax"] = {"is_output_quantized": "True"}
    config = read_aimet_config(write(values))
    on = [p.name for p in place(tiny_graph(), config) if p.spec and p.role == "activation"]
    assert [name.rsplit(".", 1)[1] for name in on] == ["softmax", "softmax"]


def test_symmetric_activations(write) -> None:
    found = specs(read_aimet_config(write(changed("defaults", "ops", "is_symmetric", to="True"))))
    assert found["classifier.output"].symmetric


def test_supergroups_are_read(write) -> None:
    found = specs(read_aimet_config(write(changed("supergroups", to=[{"op_list": ["Gemm", "Gelu"]}]))))
    assert found["bert.encoder.layer.0.intermediate.dense.output"] is None
    assert found["bert.encoder.layer.0.intermediate.intermediate_act_fn.output"] is not None


def test_inputs_are_left_alone_unless_asked_for(write) -> None:
    assert read_aimet_config(write(ZOO)).inputs
    assert not read_aimet_config(write(changed("model_input", to={}))).inputs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("extras", to={}), "unknown section.*extras"),
        (changed("defaults", "ops", "is_output_quantized", to="true"), 'is_output_quantized is \'true\'.*"True" or "False"'),
        (changed("defaults", "params", "is_symmetric", to=1), "is_symmetric is 1"),
        (changed("op_type", "Softmax", to={"is_output_quantized": "yes"}), "is_output_quantized is 'yes'"),
        (changed("params", "bias", "is_quantized", to="True"), "bias"),
        (changed("op_type", "Gemm", to={"params": {"bias": {"is_quantized": "True"}}}), "bias"),
        (changed("supergroups", to=[{"op_list": ["Gemm", "Gelo"]}]), "'Gelo'.*nearest: Gelu"),
        (changed("supergroups", to=[{"ops": ["Gemm", "Gelu"]}]), "op_list"),
        (changed("defaults", to=3), "defaults"),
        (changed("op_type", to=["Softmax"]), "op_type"),
        (changed("op_type", "Softmax", to="False"), "Softmax"),
    ],
    ids=["section", "string", "number", "in an op", "bias", "bias of an op", "op", "op_list", "defaults", "op_type", "entry"],
)
def test_errors_name_the_file_and_the_field(write, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)zoo\.json: .*{message}"):
        read_aimet_config(write(values))


def test_an_op_type_that_is_misspelt_is_warned_of_with_the_nearest(write) -> None:
    with pytest.warns(UserWarning, match=r"op_type 'LayerNormalisation'.*nearest: LayerNormalization"):
        read_aimet_config(write(changed("op_type", "LayerNormalisation", to=OFF)))


def test_the_zoos_own_file_gives_no_warning(write, recwarn) -> None:
    read_aimet_config(write(ZOO))
    assert not recwarn.list


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("defaults", "strict_symmetric"), "True", r"defaults\.strict_symmetric is True changes nothing here"),
        (("defaults", "unsigned_symmetric"), True, r"defaults\.unsigned_symmetric is True changes nothing here"),
        (("defaults", "per_chanel_quantization"), "True", r"defaults\.per_chanel_quantization changes .*nearest: per_channel_quantization"),
        (("defaults", "ops", "is_input_quantized"), "True", r"defaults\.ops\.is_input_quantized changes nothing here"),
        (("params", "wieght"), {"is_quantized": "False"}, r"params\.wieght changes nothing here \(nearest: weight\)"),
        (("op_type", "Softmax", "is_output_quantised"), "False", r"op_type\.Softmax\.is_output_quantised .*nearest: is_output_quantized"),
        (("op_type", "Gemm", "params", "weight", "bits"), 4, r"op_type\.Gemm\.params\.weight\.bits changes nothing here"),
        (("model_output", "is_output_quantized"), "True", r"model_output\.is_output_quantized changes nothing here"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_what_changes_nothing_is_named(where: tuple[str, ...], value: Any, message: str, write) -> None:
    with pytest.warns(UserWarning, match=message):
        read_aimet_config(write(changed(*where, to=value)))


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_read_whole_warns_of_nothing(write) -> None:
    read_aimet_config(write(ZOO))
