"""Products of integers against exact arithmetic: random values, extremes, every output form, both ways of computing them."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantsim.kernels.cpu import missing_for_int8
from quantsim.kernels.edges import Grid
from quantsim.kernels.int8_linear import Int8Linear, Output

EXACT = missing_for_int8()
WAYS = [
    pytest.param(True, id="kernel", marks=pytest.mark.skipif(bool(EXACT), reason=EXACT)),
    pytest.param(False, id="float32"),
]
UNSIGNED, SIGNED = Grid(0.02, 13, 0, 255), Grid(0.03, 0, -128, 127)


def layer(out: int = 48, width: int = 64, grid: Grid = UNSIGNED, packs: bool = True, bias: bool = True, seed: int = 0) -> Int8Linear:
    torch.manual_seed(seed)
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8)
    return Int8Linear(weight, torch.rand(out) * 0.01 + 0.001, torch.randn(out) if bias else None, grid, packs)


def integers(grid: Grid, *shape: int) -> Tensor:
    return torch.randint(grid.quant_min, grid.quant_max + 1, shape).to(grid.dtype)


def exact(x: Int8Linear, q: Tensor) -> Tensor:
    """The product in float64, which holds every sum exactly."""
    y = (q.double() - x.grid.zero_point) @ x.integers().double().T * x.grid.scale * x.weight_scale.double()
    return y if x.bias is None else y + x.bias.double()


@pytest.mark.parametrize("packs", WAYS)
@pytest.mark.parametrize("grid", [UNSIGNED, SIGNED], ids=["uint8", "int8"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_product_is_exact(packs, grid, shape, bias):
    x = layer(grid=grid, packs=packs, bias=bias)
    q = integers(grid, *shape)
    expected = exact(x, q)
    assert x(q).dtype == torch.float32
    assert x(q).shape == (*shape[:-1], 48)
    torch.testing.assert_close(x(q).double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.skipif(bool(EXACT), reason=EXACT)
def test_signed_activations_run_on_a_kernel_too():
    """oneDNN computes int8 × int8 by its reference code, some thousand times slower; ours must not get there."""
    seconds = {}
    for name, grid in (("uint8", UNSIGNED), ("int8", SIGNED)):
        x, q = layer(192, 192, grid), integers(grid, 192, 192)
        x(q)
        began = time.process_time()
        for _ in range(20):
            x(q)
        seconds[name] = time.process_time() - began
    assert seconds["int8"] < 50 * seconds["uint8"]


@pytest.mark.parametrize("packs", WAYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_saturate(packs, sign):
    weight = torch.full((32, 3072), 127 if sign > 0 else -128, dtype=torch.int8)
    x = Int8Linear(weight, torch.ones(32), None, Grid(1.0, 0, 0, 255), packs)
    q = torch.full((40, 3072), 255, dtype=torch.uint8)
    assert torch.equal(x(q), torch.full((40, 32), float(255 * 3072 * (127 if sign > 0 else -128))))


@pytest.mark.parametrize("packs", WAYS)
@pytest.mark.parametrize("out", [Grid(0.05, 128, 0, 255), Grid(0.04, 0, -128, 127)], ids=["uint8", "int8"])
def test_requantized_output_differs_by_a_tie_at_most(packs, out):
    x = layer(packs=packs)
    q = integers(UNSIGNED, 200, 64)
    x.give([Output(48, out)])
    steps = exact(x, q) / out.scale
    expected = (steps.round() + out.zero_point).clamp(out.quant_min, out.quant_max)
    found = x(q)
    assert found.dtype == out.dtype
    off = (found.double() - expected).abs()
    assert off.max() <= 1
    at_ties = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert (off[~at_ties] == 0).all()
    assert expected.unique().numel() > 100  # the grid is used


@pytest.mark.skipif(bool(EXACT), reason=EXACT)
@pytest.mark.parametrize("width", [64, 514, 515, 1536])
@pytest.mark.parametrize("out", [None, Grid(0.37, 127, 0, 255), Grid(0.4, 0, -128, 127)], ids=["float32", "uint8", "int8"])
@pytest.mark.parametrize("post_op", ["none", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_agree_to_the_bit(width, out, post_op, bias):
    kernel, floats = (layer(width=width, packs=packs, bias=bias) for packs in (True, False))
    for x in (kernel, floats):
        x.post_op = post_op
        x.give([Output(48, out)])
    q = integers(UNSIGNED, 2000, width)
    assert torch.equal(kernel(q), floats(q))


@pytest.mark.parametrize("packs", WAYS)
@pytest.mark.parametrize("post_op, algorithm", [("relu", "none"), ("gelu", "none"), ("gelu", "tanh")])
def test_post_ops(packs, post_op, algorithm):
    x = layer(packs=packs)
    x.post_op, x.algorithm = post_op, algorithm
    q = integers(UNSIGNED, 30, 64)
    plain = exact(x, q)
    expected = functional.relu(plain) if post_op == "relu" else functional.gelu(plain, approximate=algorithm)
    torch.testing.assert_close(x(q).double(), expected, rtol=1e-5, atol=2e-6 * plain.abs().max().item())


@pytest.mark.parametrize("packs", WAYS)
def test_layers_with_grids_of_their_own_in_one_product(packs):
    x = layer(packs=packs)
    outs = [Output(16, Grid(0.05, 128, 0, 255)), Output(24, Grid(0.011, 90, 0, 255)), Output(8, Grid(0.2, 3, 0, 255))]
    x.give(outs)
    q = integers(UNSIGNED, 100, 64)
    for found, plain, out in zip(x(q).split([16, 24, 8], -1), exact(x, q).split([16, 24, 8], -1), outs, strict=True):
        steps = plain / out.grid.scale
        expected = (steps.round() + out.grid.zero_point).clamp(0, 255)
        off = (found.double() - expected).abs()
        assert off.max() <= 1
        assert (off[(steps - steps.floor() - 0.5).abs() > 1e-4] == 0).all()
    torch.testing.assert_close(x.in_float(q).double(), exact(x, q), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("packs", WAYS)
def test_weights_come_back_as_they_were(packs):
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (40, 72), dtype=torch.int8)
    assert torch.equal(Int8Linear(weight, torch.ones(40), None, UNSIGNED, packs).integers(), weight)


@pytest.mark.parametrize("packs", WAYS)
def test_a_copy_computes_the_same(packs):
    x = layer(packs=packs)
    q = integers(UNSIGNED, 4, 64)
    copied = copy.deepcopy(x)
    copied.give([Output(48, Grid(0.05, 128, 0, 255))])
    assert x(q).dtype == torch.float32  # the original gives what it gave
    assert torch.equal(copied.in_float(q), x(q))
