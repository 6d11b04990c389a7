"""A frozen weight is quantized once; a weight that changed in between is noticed, however it was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantsim.config import QuantSpec
from quantsim.numerics.affine import affine_params, fake_quantize
from quantsim.quantizers import fake_quantizer
from quantsim.quantizers.fake_quantizer import State, WeightQuantizer, fingerprint

SPEC = QuantSpec(symmetric=True, axis=0)


def make(rows: int = 8, columns: int = 16) -> tuple[nn.Linear, WeightQuantizer]:
    layer = nn.Linear(columns, rows, bias=False)
    quantizer = WeightQuantizer(SPEC, "layer.weight", rows)
    quantizer.state = State.ESTIMATING
    quantizer.observe(layer.weight)
    quantizer.finish_estimating()
    return layer, quantizer


def expected(layer: nn.Linear, quantizer: WeightQuantizer) -> torch.Tensor:
    params = affine_params(quantizer.min.detach(), quantizer.max.detach(), SPEC)
    return fake_quantize(layer.weight.detach(), params)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time a tensor is really quantized."""
    seen: list[int] = []
    real = fake_quantizer.fake_quantize

    def counting(x, *rest):
        seen.append(x.numel())
        return real(x, *rest)

    monkeypatch.setattr(fake_quantizer, "fake_quantize", counting)
    return seen


def test_a_frozen_weight_is_quantized_once(calls: list[int]) -> None:
    layer, quantizer = make()
    with torch.no_grad():
        outputs = [quantizer(layer.weight) for _ in range(5)]
    assert len(calls) == 1
    assert all(torch.equal(out, expected(layer, quantizer)) for out in outputs)


def test_training_quantizes_at_every_forward_and_passes_gradients(calls: list[int]) -> None:
    layer, quantizer = make()
    for _ in range(3):
        quantizer(layer.weight).sum().backward()
    assert len(calls) == 3
    assert layer.weight.grad is not None
    assert quantizer.max.grad is not None


def test_nothing_frozen_is_used_where_gradients_are_asked_for() -> None:
    layer, quantizer = make()
    with torch.no_grad():
        quantizer(layer.weight)
    assert quantizer(layer.weight).requires_grad


def add_in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[0, 1] += 0.2


def write_data(layer: nn.Linear) -> None:
    layer.weight.data[0, 1] += 0.2


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 0.5


def take_a_step(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW(layer.parameters(), lr=0.05).step()


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": layer.weight.detach() * 0.5})


CHANGES = [add_in_place, write_data, replace_data, take_a_step, load]


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (64, 64)], ids=["small", "4096 elements"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_noticed(change: Callable[[nn.Linear], None], rows: int, columns: int) -> None:
    layer, quantizer = make(rows, columns)
    with torch.no_grad():
        before = quantizer(layer.weight).clone()
    change(layer)
    with torch.no_grad():
        after = quantizer(layer.weight)
    assert not torch.equal(expected(layer, quantizer), before), "the change moves no value to another step: it tests nothing"
    assert torch.equal(after, expected(layer, quantizer))


def test_rows_swapped_in_place_are_noticed_though_their_sum_stays() -> None:
    layer, quantizer = make()
    with torch.no_grad():
        layer.weight.mul_(64).round_().div_(64)  # sums of 64ths are exact
        total, before = layer.weight.sum(), quantizer(layer.weight).clone()
        layer.weight.copy_(layer.weight.flip(1))
        assert layer.weight.sum() == total
        assert torch.equal(quantizer(layer.weight), expected(layer, quantizer))
        assert not torch.equal(quantizer(layer.weight), before)


def test_a_changed_range_is_noticed() -> None:
    layer, quantizer = make()
    with torch.no_grad():
        before = quantizer(layer.weight).clone()
        quantizer.max.mul_(0.5)
        quantizer.min.mul_(0.5)
        after = quantizer(layer.weight)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected(layer, quantizer))


def test_a_quantizer_switched_off_gives_the_weight_itself() -> None:
    layer, quantizer = make()
    with torch.no_grad():
        quantizer(layer.weight)
        quantizer.state = State.OFF
        assert quantizer(layer.weight) is layer.weight


def test_two_weights_in_turn_do_not_get_each_others_values() -> None:
    layer, quantizer = make()
    other = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(quantizer(layer.weight), expected(layer, quantizer))
            assert torch.equal(quantizer(other.weight), expected(other, quantizer))


def test_a_computed_weight_is_quantized_each_time(calls: list[int]) -> None:
    layer, quantizer = make()
    with torch.no_grad():
        for factor in (1.0, 0.5):
            value = layer.weight * factor
            params = affine_params(quantizer.min, quantizer.max, SPEC)
            assert torch.equal(quantizer(value), fake_quantize(value, params))
    assert len(calls) == 2


def test_a_deep_copy_takes_its_own_weight() -> None:
    model = nn.ModuleList(make())
    with torch.no_grad():
        model[1](model[0].weight)
        other = copy.deepcopy(model)
        other[0].weight.mul_(0.5)
        assert torch.equal(other[1](other[0].weight), expected(other[0], other[1]))
        assert torch.equal(model[1](model[0].weight), expected(model[0], model[1]))


def test_a_number_alone_is_another_in_another_type() -> None:
    x = torch.tensor([0.5])
    assert fingerprint(x) != fingerprint(x.double())
