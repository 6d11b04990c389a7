"""Kernels in C++: compiled once, kept, and a reason in words where that fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from quantsim.kernels import int8_attention
from quantsim.kernels.build import CACHE, BuildError, library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))


def source(folder: Path, text: str = 'extern "C" int seven() { return 7; }') -> Path:
    path = folder / "seven.cpp"
    path.write_text(text)
    return path


@needs_compiler
def test_compiled_once_and_anew_when_the_source_changes(tmp_path):
    assert library(source(tmp_path)).seven() == 7
    (made,) = (tmp_path / "kernels").iterdir()
    when = made.stat().st_mtime_ns
    assert library(source(tmp_path)).seven() == 7
    assert made.stat().st_mtime_ns == when
    assert library(source(tmp_path, 'extern "C" int seven() { return 8; }')).seven() == 8
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@needs_compiler
def test_a_source_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(BuildError, match=r"g\+\+ refused seven.cpp: .*no such thing"):
        library(source(tmp_path, "#error no such thing"))
    assert list((tmp_path / "kernels").iterdir()) == []


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: no-such-compiler was not found"):
        library(source(tmp_path))


@needs_compiler
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"seven.cpp: .*file"):
        library(source(tmp_path))


def test_what_misses_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    int8_attention._kernel.cache_clear()
    int8_attention.missing_for_attention.cache_clear()
    try:
        assert int8_attention.missing_for_attention() == "no C++ compiler: no-such-compiler was not found"
    finally:
        int8_attention._kernel.cache_clear()
        int8_attention.missing_for_attention.cache_clear()


def test_no_home_and_a_compiler_that_is_no_command(tmp_path, monkeypatch):
    """As in a container whose user is a mere number."""
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(BuildError, match='CXX is "g\\+\\+ \'": No closing quotation'):
        library(source(tmp_path))
    monkeypatch.delenv("CXX")
    monkeypatch.delenv(CACHE)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 0, "g++ 12", ""))
    with pytest.raises(BuildError, match=f"Could not determine home directory.; set {CACHE} to a folder"):
        library(source(tmp_path))


@needs_compiler
def test_an_empty_compiler_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", " ")
    assert library(source(tmp_path)).seven() == 7
