"""The moving average of weights: its values, and that a checkpoint brings them back."""

from __future__ import annotations

import torch
from torch import nn

from recipes.averages import Averages


def test_it_is_the_written_out_mean() -> None:
    weight, decay = nn.Parameter(torch.tensor([1.0, -2.0])), 0.6
    averages, expected = Averages([weight], decay), weight.detach().double()
    for t in range(1, 30):
        weight.data = torch.randn(2, generator=torch.Generator().manual_seed(t))
        averages.update()
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * weight.detach().double()
    averages.put()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_its_state_goes_on_where_it_was() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    first = Averages(weights, 0.9)
    for step in range(4):
        for p in weights:
            p.data.fill_(step)
        first.update()
    second = Averages(weights, 0.9)
    second.load_state_dict(first.state_dict())
    for averages in (first, second):
        averages.update()
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))
    assert int(second.steps) == 5
