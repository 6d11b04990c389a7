"""How near outputs are: the equation on tensors small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantsim.cli.fidelity import Nearness, nearness

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
CPU = torch.device("cpu")


class Gives(nn.Module):
    """A model that gives what it was made with."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **_: Tensor) -> dict[str, Tensor]:
        return self.outputs


def near(name: str, x: Tensor, y: Tensor) -> Nearness:
    return nearness(Gives(**{name: x}), Gives(**{name: y}), [{"attention_mask": MASK}], ["attention_mask"], CPU)[name]


def test_the_ratio_of_signal_and_noise() -> None:
    found = near("pooler_output", torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[3.0, 4.5], [0.0, 5.0]]))
    assert found.sqnr == pytest.approx(10 * math.log10(50 / 0.25))
    assert found.agreement is None


def test_padding_is_left_out() -> None:
    x = torch.ones(2, 3, 2)
    y = x.clone()
    y[0, 2] = y[1, 1:] = 9.0
    found = near("last_hidden_state", x, y)
    assert (found.signal, found.noise, found.sqnr) == (6.0, 0.0, None)


@pytest.mark.parametrize(
    "change, same, decisions",
    [
        (lambda y: y[0, 0].neg_(), 2, 3),
        (lambda y: y[0, 2].neg_(), 3, 3),
    ],
    ids=["a token", "padding"],
)
def test_decisions_of_tokens(change: Callable[[Tensor], Any], same: int, decisions: int) -> None:
    x = torch.tensor([1.0, -1.0]).repeat(2, 3, 1)
    y = x.clone()
    change(y)
    found = near("logits", x, y)
    assert (found.same, found.decisions) == (same, decisions)


def test_decisions_of_rows() -> None:
    found = near("logits", torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    assert found.agreement == 50.0


def test_a_span_is_a_choice_of_one_token() -> None:
    x = torch.tensor([[1.0, 2.0, 9.0], [1.0, 5.0, 5.0]])  # padding is never chosen
    y = torch.tensor([[2.0, 1.0, 9.0], [1.0, 9.0, 9.0]])
    found = near("start_logits", x, y)
    assert (found.same, found.decisions) == (1, 2)


def test_batches_add_up() -> None:
    x, y = torch.ones(2, 4), torch.full((2, 4), 1.5)
    batch = {"attention_mask": MASK, "unknown": torch.zeros(1)}
    found = nearness(Gives(a=x), Gives(a=y), [batch, batch], ["attention_mask"], CPU)["a"]
    assert (found.signal, found.noise) == (16.0, 4.0)


def test_a_model_that_takes_no_mask() -> None:
    """FNet: padding is left out all the same."""
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0]])}
    outputs = [{"last_hidden_state": torch.tensor([[[1.0], [2.0], [last]]])} for last in (3.0, 99.0)]
    models = [lambda input_ids, given=given: given for given in outputs]
    (found,) = nearness(*models, [batch], ["input_ids"], torch.device("cpu")).values()
    assert (found.signal, found.noise) == (5.0, 0.0)
