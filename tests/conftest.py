"""One thread and one seed for every test: what a test computes does not hang on the machine or on the test before it.

A program that a test starts, and what compiles kernels, has one thread too: the tests themselves run in several processes.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import pytest
import torch

for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(name, "1")  # for the processes of pytest-xdist and of tests, which start after this
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = TemporaryDirectory(prefix="quantsim-tests-")
    os.environ["HF_DATASETS_CACHE"] = CACHE.name  # not the user's, which would keep every row that a test made up

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
