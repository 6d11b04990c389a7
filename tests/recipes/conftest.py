"""The tiny bundle of the zoo's tests, and a Hub that is out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest

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
