"""What a quantized model runs on, from the evaluator's flag; and the parity command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from model_zoo.cards import Card
from quantsim import QuantSim
from quantsim.kernels.cpu import missing_for_int8
from quantsim.kernels.int8_linear import Int8Linear
from recipes import parity
from recipes.backends import BACKENDS, on_backend
from recipes.bert_quanteval import main
from recipes.tasks import RecipeError
from tests.recipes.test_data import RTE, write_dataset
from tests.tiny import tiny_batch, tiny_sim

NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


def backend(name: str) -> object:
    installed = name not in NEEDS or importlib.util.find_spec(NEEDS[name])
    marks = [] if installed else [pytest.mark.skip(reason=f"{name} is not installed")]
    return pytest.param(name, marks=[*marks, pytest.mark.slow] if name == "int8-compiled" else marks)


@pytest.fixture
def glue(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "glue", "rte", {"validation": RTE})


@pytest.mark.parametrize("name", [backend(name) for name in BACKENDS])
@torch.no_grad()
def test_every_backend_gives_the_logits_of_the_simulation(name: str) -> None:
    sim = tiny_sim(config="deploy")
    batch = tiny_batch(3, 11, seed=4)
    expected = sim.model(**batch).logits
    if name == "openvino" and missing_for_int8():
        with pytest.warns(UserWarning, match="openvino: figures will be of wrong products: this CPU's int8 kernels saturate"):
            BACKENDS[name](sim)
        return
    found = BACKENDS[name](sim)(**batch)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_the_flag(bundle: Card, glue: str, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_config", "bert_w8a8_rte", "--checkpoint", str(bundle.folder), "--dataset", glue]
    assert main([*flags, "--output_dir", str(tmp_path / "a")]) == 0
    assert main([*flags, "--output_dir", str(tmp_path / "b"), "--backend", "int8"]) == 0
    assert "W8A8 runs: int8" in capsys.readouterr().out
    written = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert [w["arguments"]["backend"] for w in written] == ["simulated", "int8"]
    assert written[0]["results"][0]["w8a8"]["metrics"] == written[1]["results"][0]["w8a8"]["metrics"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--backend", "tensorrt"], "--backend tensorrt: expected one of simulated, int8"),
        (["--backend", "int8", "--device", "cuda"], "--backend int8 runs on the CPU"),
    ],
)
def test_a_backend_that_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_config", "bert_w8a8_rte", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, bundle: Card, glue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    flags = ["--model_config", "bert_w8a8_rte", "--checkpoint", str(bundle.folder), "--dataset", glue, "--output_dir", str(tmp_path)]
    assert main([*flags, "--backend", "openvino"]) == 2
    assert 'not installed; pip install -e ".[bench]"' in capsys.readouterr().err


# ---- the parity command ----


def test_parity(bundle: Card, glue: str, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--model_config", "bert_w8a8_rte", "--checkpoint", str(bundle.folder), "--dataset", glue]) == 0
    out = capsys.readouterr().out
    assert "0 off by more" in out
    assert "requantization noise" in out


def test_parity_that_does_not_hold(
    bundle: Card, glue: str, no_hub: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = QuantSim.lower

    def planted(sim: QuantSim) -> object:
        lowered = lower(sim)
        next(m for m in lowered.graph.modules() if isinstance(m, Int8Linear)).weight_scale.mul_(1.05)
        for module in lowered.graph.modules():
            if isinstance(module, Int8Linear):
                module.give(module.outputs)
        return lowered

    monkeypatch.setattr(QuantSim, "lower", planted)
    assert parity.main(["--model_config", "bert_w8a8_rte", "--checkpoint", str(bundle.folder), "--dataset", glue]) == 1


def test_parity_of_nothing_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--model_config", "bert_w8a8_rtee"]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_simulation_that_has_no_integer_form() -> None:
    with pytest.raises(RecipeError, match=r"--backend integers: .*8 bits"):
        on_backend(tiny_sim(config="q8bert"), "integers")
