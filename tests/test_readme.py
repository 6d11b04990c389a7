"""The README says what is so: its table is the cards', and its example runs."""

import re
from pathlib import Path

import pytest

from model_zoo.__main__ import listing
from model_zoo.cards import find, published

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_results_are_those_of_the_cards():
    assert published()
    assert listing([find(name) for name in published()]) in README


def test_the_example_has_fifteen_lines_and_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert "bert.pooler.dense.weight" in capsys.readouterr().out
    assert (tmp_path / "bert-w8a8" / "model.safetensors").is_file()
    assert type(scope["again"]) is type(scope["sim"])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w/]+\.(?:py|yaml)\b", README))))
def test_files_that_are_named_exist(path):
    assert (Path(__file__).parents[1] / path).is_file()
