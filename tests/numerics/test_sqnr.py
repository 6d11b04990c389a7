"""Sums of squares of a tensor and of its error."""

from __future__ import annotations

import math

import pytest
import torch

from quantsim.numerics.sqnr import Noise, sqnr_db


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_measured_is_left_alone(dtype: torch.dtype) -> None:
    x, x_hat = torch.ones(2, 3, dtype=dtype), torch.full((2, 3), 0.75, dtype=dtype)
    assert Noise.between(x, x_hat) == Noise(6.0, 6 * 0.0625)
    assert torch.equal(x, torch.ones(2, 3, dtype=dtype))
    assert torch.equal(x_hat, torch.full((2, 3), 0.75, dtype=dtype))


def test_noise_without_end() -> None:
    assert sqnr_db(1.0, math.inf) == -math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf
    assert sqnr_db(1.0, 0.0) == math.inf
