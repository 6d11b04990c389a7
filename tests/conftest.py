"""One thread and one seed for every test: what a test computes does not hang on the machine or on the test before it."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
