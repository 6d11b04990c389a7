"""What the tests of products multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from quantsim.numerics.fixed_point import limit_of, mantissa_dtype


def mantissas(bits: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Random ones; for every third seed the largest, with signs that don't cancel."""
    limit = limit_of(bits)
    m = torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed))
    return (torch.full(shape, limit if seed % 2 else -limit) if seed % 3 == 0 else m).to(mantissa_dtype(bits))
