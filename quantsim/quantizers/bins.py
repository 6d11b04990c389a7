"""The bins of histograms that can be added: where they are follows from the values' extremes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsim.numerics.affine import smallest_range

FLOAT32_STEP = 2.0**-24  # of the greatest value: finer bins would tell apart what float32 does not


@dataclass(frozen=True)
class Bins:
    """Equal bins of each row, anchored at 0: bin ``i`` holds the values of ``width * [first + i, first + i + 1)``.

    Widths are powers of 2, so a value's bin is computed without rounding, and two bins of one width are one bin of the next.

    Attributes:
        width, first: ``[C]``, float64.
        count: bins of a row.

    >>> bins = Bins.over(torch.tensor([-1.0]), torch.tensor([1.2]), count=6)
    >>> bins.edges().tolist()
    [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]]
    >>> bins.of(torch.tensor([[-1.0, 0.0, 0.4, 1.2]]))
    tensor([[0, 2, 2, 4]])
    """

    width: Tensor
    first: Tensor
    count: int

    @classmethod
    def over(cls, low: Tensor, high: Tensor, count: int) -> Bins:
        """The finest bins that hold ``[low, high]``; a function of the two alone. A wider range has bins as wide or wider."""
        low, high = low.double(), high.double()
        finest = torch.maximum(low.abs(), high.abs()) * FLOAT32_STEP
        wanted = torch.maximum((high - low) / count, finest).clamp(min=smallest_range(torch.float32) / count)
        width = wanted / torch.frexp(wanted)[0]  # the next power of 2
        width = torch.where((high / width).floor() - (low / width).floor() < count, width, 2 * width)
        return cls(width, (low / width).floor(), count)

    def of(self, rows: Tensor) -> Tensor:
        """The bin of every value, ``[C, n] -> [C, n]``."""
        return (rows * (1 / self.width).to(rows.dtype)[:, None]).floor_().long() - self.first.long()[:, None]

    def edges(self) -> Tensor:
        """Where the bins begin, ``[C, count]``."""
        return self.width[:, None] * (self.first[:, None] + torch.arange(self.count, device=self.width.device))

    def hold(self, counts: Tensor, old: Bins) -> Tensor:
        """The counts of finer bins whose values all lie in these ones, ``[C, count] -> [C, count]``."""
        index = (old.edges() / self.width[:, None]).floor() - self.first[:, None]
        return torch.zeros_like(counts).scatter_add_(1, index.long().clamp_(0, self.count - 1), counts)  # only empty bins lie outside
