"""The check of the integer kernels: it has to notice kernels that saturate."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from quantsim.kernels.cpu import missing_for_int8

SAY = "from quantsim.kernels.cpu import missing_for_int8; print(missing_for_int8())"


def said(isa: str) -> str:
    """What a process says whose oneDNN uses no instructions newer than ``isa``."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", SAY], env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(bool(missing_for_int8()), reason="needs a machine with exact kernels")
def test_kernels_that_saturate_are_noticed():
    assert "saturate" in said("AVX512_CORE")


def test_other_devices_have_no_such_kernels():
    assert "cuda" in missing_for_int8(torch.device("cuda", 0))
