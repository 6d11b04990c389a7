"""A moving average of the weights beside those that are trained: what a stage ends with, where its recipe asks for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Averages(nn.Module):
    """``average += (1 - d) * (weight - average)`` after each step, with ``d = min(decay, (1 + t) / (10 + t))`` in step ``t``.

    Tarvainen and Valpola (2017, "Mean teachers"): the mean of the last ``1 / (1 - decay)`` steps or so, shorter at the start so
    that the first weights are forgotten. Its ``state_dict`` is what a checkpoint holds of it.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> averages = Averages([weight], decay=0.5)
    >>> _ = weight.data.fill_(11.0)
    >>> averages.update()
    >>> averages.put()
    >>> weight.item()
    9.0
    """

    steps: Tensor

    def __init__(self, weights: Sequence[nn.Parameter], decay: float) -> None:
        super().__init__()
        self.weights, self.decay = list(weights), decay
        self.values = [p.detach().clone() for p in weights]
        for i, value in enumerate(self.values):
            self.register_buffer(str(i), value)
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        t = int(self.steps)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.weights], 1 - min(self.decay, (1 + t) / (10 + t)))

    @torch.no_grad()
    def put(self) -> None:
        """Give the weights their averages."""
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.copy_(value)
