"""A tiny bundle: made once, copied for the tests that break it; and a server that can hold it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import file_download

from model_zoo.cards import Card, read_card
from recipes.hub import hub_reachable
from tests.model_zoo.loopback import Server, serving
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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on loopback, which is the Hub too; an empty cache; chunks, time-outs and pauses as small as the files."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("model_zoo.download.CHUNK", 512)
    monkeypatch.setenv("QUANTSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANTSIM_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
        hub_reachable.cache_clear()
        yield running
    hub_reachable.cache_clear()
    huggingface_hub.close_session()
