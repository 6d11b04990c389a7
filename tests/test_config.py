"""Configs: frozen, validated where they are made, JSON in and out, every error naming its field."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from quantsim import ConfigError, QuantConfig, QuantSpec, Rule
from quantsim.sim import resolve_config

PRESETS = QuantConfig.presets()


def test_the_presets_are_these() -> None:
    assert PRESETS == ["aimet", "aimet_per_tensor", "bondarenko", "deploy", "ibert", "q8bert"]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trips_through_json(name: str) -> None:
    config = QuantConfig.preset(name)
    assert config.name == name
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_everything_that_can_be_set_round_trips_through_json() -> None:
    config = QuantConfig(
        weights=QuantSpec(bits=4, symmetric=True, axis=1, estimator="mse", learn=False),
        activations=QuantSpec(bits=16, estimator="percentile", percentile=99.0),
        inputs=False,
        mask_clamp=-20.0,
        supergroups=(("linear", "gelu"), ("linear", "add", "layer_norm")),
        rules=(
            Rule(op="add", role="activation", set={"bits": 16, "estimator": "running_min_max", "momentum": 0.5}),
            Rule(module="*.query.*", enabled=False, optional=True, reason="because"),
        ),
        name="mine",
    )
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("field", ["weights", "activations", "mask_clamp"])
def test_nothing_round_trips_through_json(field: str) -> None:
    config = QuantConfig(**{field: None})
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"activations": {"bits": 6}}))
    assert QuantConfig.from_json(path).activations == QuantSpec(bits=6)


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        QuantConfig().inputs = False  # type: ignore[misc]


def test_with_rules_leaves_the_first_config_alone() -> None:
    config = QuantConfig.preset("aimet")
    more = config.with_rules(Rule(op="gelu", enabled=False))
    assert len(more.rules) == len(config.rules) + 1
    assert config == QuantConfig.preset("aimet")


def test_a_rule_applies_to_a_copy() -> None:
    spec = QuantSpec()
    assert Rule(op="add", set={"bits": 16}).apply(spec) == QuantSpec(bits=16)
    assert spec == QuantSpec()


# ---- what means nothing is refused where it is made ----

BAD_SPECS: list[tuple[str, Any]] = [
    ("bits", 1),
    ("bits", 17),
    ("bits", 8.0),
    ("bits", "8"),
    ("bits", True),
    ("symmetric", "True"),
    ("symmetric", None),
    ("axis", "0"),
    ("axis", True),
    ("axis", 1.0),
    ("estimator", "minmax"),
    ("estimator", None),
    ("learn", 1),
    ("percentile", 50.0),
    ("percentile", 100.1),
    ("percentile", float("nan")),
    ("percentile", "99"),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", "0.9"),
]
BAD_RULES: list[tuple[str, Any]] = [
    ("op", 3),
    ("module", 3),
    ("role", "weights"),
    ("enabled", "False"),
    ("set", {"bits": 99}),
    ("set", {"bit": 8}),
    ("set", 3),
    ("optional", "yes"),
    ("reason", 3),
]
BAD_CONFIGS: list[tuple[str, Any]] = [
    ("weights", 8),
    ("weights", {"bits": 0}),
    ("weights", {"bit": 8}),
    ("activations", {"axis": 0}),
    ("activations", "8"),
    ("inputs", "False"),
    ("inputs", None),
    ("mask_clamp", 0),
    ("mask_clamp", 6.0),
    ("mask_clamp", -1e5),
    ("mask_clamp", float("nan")),
    ("mask_clamp", "-6"),
    ("supergroups", [["linear"]]),
    ("supergroups", ["linear", "gelu"]),
    ("supergroups", 3),
    ("rules", 3),
    ("rules", [3]),
    ("rules", {"op": "add"}),
    ("name", 3),
]


def ids(case: Any) -> str:
    return repr(case)


@pytest.mark.parametrize(("field", "value"), BAD_SPECS, ids=ids)
def test_a_bad_spec_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"QuantSpec\.{field}"):
        QuantSpec(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD_RULES, ids=ids)
def test_a_bad_rule_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Rule\.{field}|QuantSpec\.bits"):
        Rule(**({"op": "add"} | {field: value}))


def test_a_rule_without_a_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="no op, no module and no role"):
        Rule(enabled=False)


@pytest.mark.parametrize(("field", "value"), BAD_CONFIGS, ids=ids)
def test_a_bad_config_from_json_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"QuantConfig\.{field}|QuantSpec|Rule"):
        QuantConfig.from_dict({field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("weights", {"bits": 8}), ("activations", 8), ("rules", [{"op": "add"}]), ("inputs", "False")], ids=ids
)
def test_a_bad_config_from_python_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"QuantConfig\.{field}"):
        QuantConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "near"),
    [({"activation": {}}, "activations"), ({"weights": {"bit": 4}}, "bits"), ({"rules": [{"modul": "x"}]}, "module")],
    ids=["config", "spec", "rule"],
)
def test_an_unknown_field_is_answered_with_the_nearest(values: dict[str, Any], near: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest: {near}"):
        QuantConfig.from_dict(values)


@pytest.mark.parametrize("values", [[], "aimet", None, 3], ids=ids)
def test_json_that_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        QuantConfig.from_dict(values)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'bondarenk'.*nearest: bondarenko"):
        QuantConfig.preset("bondarenk")


@pytest.mark.parametrize("text", ["{", "", "\x00\xff"], ids=["half", "empty", "binary"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.json"):
        resolve_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        resolve_config(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match=r"nowhere"):
        resolve_config(tmp_path / "nowhere")


@pytest.mark.parametrize("given", [None, "aimet", QuantConfig.preset("aimet")], ids=["default", "name", "config"])
def test_the_default_is_the_preset_aimet(given: Any) -> None:
    assert resolve_config(given) == QuantConfig.preset("aimet")
