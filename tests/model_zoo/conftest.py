"""A tiny bundle: made once, copied for the tests that break it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model_zoo.cards import Card, read_card
from tests.model_zoo.tiny_bundle import make_base, make_bundle


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Card:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bert_w8a8_rte", base)


@pytest.fixture
def bundle(tmp_path: Path, whole_bundle: Card) -> Card:
    """A bundle that the test may break."""
    shutil.copytree(whole_bundle.folder, tmp_path / "bert_w8a8_rte")
    return read_card(tmp_path / "bert_w8a8_rte")
