"""The README says what is so: its example runs, and files that it names are there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    first, _, second = EXAMPLES
    assert len(first.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(first, scope)
    assert "bert.pooler.dense.weight" in capsys.readouterr().out
    exec(second, scope)
    assert "int8 product" in capsys.readouterr().out
    for path in ("bert-int8/model.safetensors", "bert-qdq.onnx", "bert.encodings"):
        assert (tmp_path / path).is_file()
    assert (tmp_path / "bert-w8a8" / "model.safetensors").is_file()
    assert type(scope["again"]) is type(scope["sim"])


def test_fine_tuned_with_trainer_loaded_and_run_in_a_pipeline(tmp_path, monkeypatch, capsys):
    _, script, _ = EXAMPLES
    assert len(script.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(script, scope)
    assert re.findall(r"'label': '(\w+)'", capsys.readouterr().out) == ["good", "bad"]
    assert scope["model"] is not scope["trainer"].model
    trained, loaded = scope["trainer"].model.state_dict(), scope["model"].state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(x, loaded[name]) for name, x in trained.items())
    assert any(name.startswith("quantizers.") for name in loaded)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w/]+\.(?:py|yaml)\b", README))))
def test_files_that_are_named_exist(path):
    assert (Path(__file__).parents[1] / path).is_file()


def test_the_table_of_engines_is_the_measured_one():
    measured = (Path(__file__).parents[1] / "benchmarks" / "engines" / "engines.md").read_text(encoding="utf-8")
    assert measured.split("\n\n", 1)[1].strip() in README
