"""How near a model's outputs are to another's, whatever its head: no labels are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Nearness:
    """One output, over all batches.

    Attributes:
        signal, noise: sums of ``x²`` and of ``(x - y)²``, ``x`` the reference's.
        same, decisions: decisions that are equal, and all; there are none where the output is not a score of something.
    """

    signal: float = 0.0
    noise: float = 0.0
    same: int = 0
    decisions: int = 0

    @property
    def sqnr(self) -> float | None:
        """``10 log10(signal / noise)`` in dB; ``None`` where nothing differs."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None

    @property
    def agreement(self) -> float | None:
        """Decisions that are equal, in percent."""
        return 100 * self.same / self.decisions if self.decisions else None


@torch.no_grad()
def nearness(
    reference: nn.Module, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], takes: Iterable[str], device: torch.device
) -> dict[str, Nearness]:
    """Run both on every batch and compare each output that both have.

    Args:
        reference, model: in eval mode, on one device; models of ``transformers``, or engines with their outputs.
        batches: ids ``[rows, tokens]`` by keyword.
        takes: the inputs that the models take.
        device: where they are.

    Returns:
        By output name. Padding is left out. Logits decide: the greatest of the last axis, of a row or of each token.
    """
    known = set(takes)
    found: dict[str, Nearness] = {}
    for batch in batches:
        inputs = {name: x.to(device) for name, x in batch.items() if name in known}
        expected, actual = reference(**inputs), model(**inputs)
        ids = next(iter(batch.values()))
        seen = batch.get("attention_mask", torch.ones_like(ids)).to(device).bool()  # whether the model takes a mask or not
        for name, x in expected.items():
            if isinstance(x, Tensor) and name in actual:
                _add(found.setdefault(name, Nearness()), name, x.float(), actual[name].to(x.device).float(), seen)
    return found


def _add(found: Nearness, name: str, x: Tensor, y: Tensor, seen: Tensor) -> None:
    """Take an output ``[rows, …]`` into account; ``seen`` is ``[rows, tokens]``, false where there is padding."""
    of_tokens = x.shape[:2] == seen.shape
    if "logits" in name and x.shape[-1] > 1:
        spans = x.ndim == 2 and of_tokens  # a score for each token, of which one is chosen
        best_x, best_y = ((v.masked_fill(~seen, -torch.inf) if spans else v).argmax(-1) for v in (x, y))
        equal = best_x == best_y
        equal = equal[seen] if equal.shape == seen.shape else equal
        found.same += int(equal.sum())
        found.decisions += equal.numel()
    if of_tokens:
        x, y = x[seen], y[seen]
    found.signal += float(x.double().square().sum())
    found.noise += float((x.double() - y.double()).square().sum())
