"""Convolutions of one to three dimensions: exact on the mapped operands, whatever the stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from quantsim.rewrites.integer_training.convolution import convolution
from tests.rewrites.integer_training.mapped import leaf, mapper, value

FLOAT = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "patches": ((2, 3, 8, 8), (6, 3, 4, 4), {"stride": (4, 4)}),
    "patches that leave a rest": ((2, 3, 9, 10), (6, 3, 4, 4), {"stride": (4, 4)}),
    "overlapping": ((2, 3, 8, 7), (4, 3, 3, 3), {"stride": (2, 1), "padding": (1, 2)}),
    "dilated": ((2, 3, 9, 9), (4, 3, 3, 2), {"dilation": (2, 3), "padding": (2, 0)}),
    "grouped": ((2, 4, 6, 6), (8, 2, 3, 3), {"groups": 2, "padding": (1, 1)}),
    "depthwise 1d": ((2, 6, 12), (6, 1, 5), {"groups": 6, "padding": (2,)}),
    "one padding for all axes": ((2, 2, 6, 6), (3, 2, 3, 3), {"padding": (1,)}),
    "same": ((2, 2, 6, 7), (3, 2, 4, 3), {"padding": "same"}),
    "valid": ((2, 2, 6), (3, 2, 4), {"padding": "valid"}),
    "3d": ((1, 2, 4, 5, 6), (3, 2, 2, 2, 3), {"stride": (2, 1, 2), "padding": (0, 1, 1)}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16), (10, 6, 12)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact_on_its_integers(case: str, bits: tuple[int, int, int]) -> None:
    x_shape, w_shape, options = CASES[case]
    m = mapper(bits)
    x, w, b = leaf(*x_shape), leaf(*w_shape), leaf(w_shape[0])
    y = convolution(m, x, w, b, **options)
    g = torch.randn_like(y)
    y.backward(g)
    x64, w64 = value(m, x, "activation").requires_grad_(), value(m, w, "weight").requires_grad_()
    y64 = FLOAT[len(x_shape) - 2](x64, w64, None, **options)
    rows = value(m, g.movedim(1, -1).reshape(-1, g.shape[1]), "gradient")  # mapped in the order in which it is used
    y64.backward(rows.reshape(g.movedim(1, -1).shape).movedim(-1, 1))
    assert torch.equal(y, y64.float() + b.reshape(1, -1, *[1] * (len(x_shape) - 2)))
    assert torch.equal(x.grad, x64.grad.float())
    assert torch.equal(w.grad, w64.grad.float())
    assert torch.equal(b.grad, rows.sum(0).float())


def test_nothing_and_zeros() -> None:
    for batch in (0, 2):
        x, w = torch.zeros(batch, 3, 8, 8, requires_grad=True), leaf(6, 3, 4, 4)
        y = convolution(mapper(), x, w, None, stride=(4, 4))
        y.sum().backward()
        assert y.shape == (batch, 6, 2, 2)
        assert not y.any()
        assert not w.grad.any()


def test_an_all_zero_channel_stays_zero() -> None:
    w = torch.randn(6, 3, 4, 4)
    w[2] = 0
    assert not convolution(mapper(), torch.randn(2, 3, 8, 8), w, None, stride=(4, 4))[:, 2].any()
