"""The tiny bundle of the zoo's tests, and a Hub that is out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import yaml

from recipes.hub import hub_reachable
from tests.model_zoo.conftest import base, bundle, server, whole_bundle  # noqa: F401


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No request leaves, and nothing that an earlier run cached is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_reachable.cache_clear()
    yield
    hub_reachable.cache_clear()


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:  # noqa: F811
    """The module's ``RECIPE`` as a file, on the tiny base model."""
    path = tmp_path_factory.mktemp("recipe") / "rte.yaml"
    path.write_text(yaml.safe_dump({**request.module.RECIPE, "base_model": str(base)}))
    return path
