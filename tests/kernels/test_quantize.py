"""Values to integers in one pass: those of the plain function, and no number for what is none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantsim.kernels import quantize
from quantsim.kernels.edges import Grid, to_integers
from quantsim.kernels.quantize import finite_to_integers, missing_for_quantize

GRIDS = [Grid(0.1, 0, -128, 127), Grid(0.037, 93, 0, 255), Grid(1e-6, 0, -7, 7), Grid(3.0, 15, 0, 15)]


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(quantize, "missing_for_quantize", lambda: "not now")
    elif missing_for_quantize():
        pytest.skip(missing_for_quantize())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_integer_every_tie_and_beyond_both_ends(grid: Grid) -> None:
    halves = torch.arange(-600, 601).float() / 2
    scale = torch.tensor(grid.scale)
    x = torch.cat([halves * scale, torch.nextafter(halves * scale, torch.tensor(math.inf)), torch.tensor([1e30, -1e30, 0.0, -0.0, 1e-45])])
    found = finite_to_integers(x, grid)
    assert found is not None
    assert found.dtype == grid.dtype
    assert torch.equal(found, to_integers(x, *grid.numbers))


@settings(max_examples=50, deadline=None)
@given(size=st.sampled_from((1, 7, 4096, 4097, 70_000)), seed=st.integers(0, 99), place=st.sampled_from(range(len(GRIDS))))
def test_any_size(size: int, seed: int, place: int) -> None:
    grid = GRIDS[place]
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * grid.scale * 200
    found = finite_to_integers(x, grid)
    assert found is not None
    assert torch.equal(found, to_integers(x, *grid.numbers))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [5, 70_000])
def test_what_is_no_number_gives_no_integers(value: float, size: int) -> None:
    x = torch.ones(size)
    x[size // 2] = value
    assert finite_to_integers(x, GRIDS[0]) is None


def test_strides_and_shapes() -> None:
    x = torch.randn(6, 10).t()
    found = finite_to_integers(x, GRIDS[1])
    assert found is not None
    assert torch.equal(found, to_integers(x, *GRIDS[1].numbers))
    assert finite_to_integers(torch.zeros(0, 4), GRIDS[0]) is not None
