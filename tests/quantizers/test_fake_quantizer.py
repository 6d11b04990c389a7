"""The fake quantizer: its four states, what is kept of them, and calibrations that must fail."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import affine_params, fake_quantize
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, MaskedScoreQuantizer, State

ESTIMATORS = ["min_max", "running_min_max", "percentile", "mse", "sqnr"]


def calibrated(x: Tensor, spec: QuantSpec | None = None, kind: type[FakeQuantizer] = FakeQuantizer) -> FakeQuantizer:
    spec = spec or QuantSpec()
    quantizer = kind(spec, "some.edge", None if spec.axis is None else x.shape[spec.axis])
    quantizer.state = State.ESTIMATING
    quantizer(x)
    quantizer.finish_estimating()
    return quantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6) * 3


# ---- states ----


@pytest.mark.parametrize("state", [State.OFF, State.ESTIMATING], ids=lambda s: s.name)
def test_off_and_estimating_pass_the_very_tensor_on(state: State, x: Tensor) -> None:
    quantizer = FakeQuantizer(QuantSpec(), "some.edge")
    quantizer.state = state
    assert quantizer(x) is x


@pytest.mark.parametrize("state", [State.FIXED, State.LEARNING], ids=lambda s: s.name)
def test_fixed_and_learning_quantize_on_the_calibrated_range(state: State, x: Tensor) -> None:
    quantizer = calibrated(x)
    quantizer.state = state
    assert torch.equal(quantizer(x), fake_quantize(x, affine_params(x.min(), x.max(), QuantSpec())))


@pytest.mark.parametrize("state", State, ids=lambda s: s.name)
def test_only_a_learning_range_takes_gradients(state: State) -> None:
    quantizer = FakeQuantizer(QuantSpec(), "some.edge")
    quantizer.state = state
    assert quantizer.min.requires_grad == quantizer.max.requires_grad == (state is State.LEARNING)
    assert quantizer.calibrated == (state in (State.FIXED, State.LEARNING, State.FOLLOWING))


@pytest.mark.parametrize(("learn", "state"), [(True, State.LEARNING), (False, State.FIXED)], ids=["learn", "fixed"])
def test_the_spec_says_whether_a_calibrated_range_learns(learn: bool, state: State, x: Tensor) -> None:
    assert calibrated(x, QuantSpec(learn=learn)).state is state


def test_estimating_changes_no_range_before_it_is_finished(x: Tensor) -> None:
    quantizer = calibrated(x)
    before = quantizer.max.item()
    quantizer.state = State.ESTIMATING
    quantizer(10 * x)
    assert quantizer.max.item() == before
    quantizer.finish_estimating()
    assert quantizer.max.item() == (10 * x).max().item()


def test_a_second_calibration_forgets_the_first(x: Tensor) -> None:
    quantizer = calibrated(100 * x)
    quantizer.state = State.ESTIMATING
    quantizer(x)
    quantizer.finish_estimating()
    assert quantizer.max.item() == x.max().item()


def test_a_fixed_range_still_passes_gradients_to_its_input(x: Tensor) -> None:
    quantizer = calibrated(x, QuantSpec(learn=False))
    x = (x * 2).requires_grad_()
    quantizer(x).sum().backward()
    low, high = quantizer.min.item(), quantizer.max.item()
    step = (high - low) / 255
    inside = (x > low + step) & (x < high - step)
    outside = (x < low - step) | (x > high + step)
    assert inside.any()
    assert outside.any()
    assert (x.grad[inside] == 1).all()
    assert (x.grad[outside] == 0).all()
    assert quantizer.min.grad is None


# ---- what is kept ----


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_state_dict_holds_state_and_range(axis: int | None, x: Tensor) -> None:
    spec = QuantSpec(axis=axis)
    saved = calibrated(x, spec)
    loaded = FakeQuantizer(spec, "some.edge", None if axis is None else x.shape[axis])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state is State.LEARNING
    assert loaded.min.requires_grad
    assert torch.equal(loaded(x), saved(x))


def test_loading_an_uncalibrated_state_switches_a_quantizer_off(x: Tensor) -> None:
    quantizer = calibrated(x)
    quantizer.load_state_dict(FakeQuantizer(QuantSpec(), "some.edge").state_dict())
    assert quantizer.state is State.OFF
    assert quantizer(x) is x


def test_a_deep_copy_is_independent(x: Tensor) -> None:
    quantizer = calibrated(x)
    before = quantizer(x).detach().clone()
    other = copy.deepcopy(quantizer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.max.mul_(0.25)
    assert not torch.equal(other(x), before)
    assert torch.equal(quantizer(x), before)


@pytest.mark.parametrize("how", ["in place", ".data", "optimizer", "load_state_dict"])
@pytest.mark.parametrize("axis", [None, 1])
def test_a_changed_range_is_noticed(how: str, axis: int | None, x: Tensor) -> None:
    quantizer = calibrated(x, QuantSpec(axis=axis))
    with torch.no_grad():
        before = quantizer(x).clone()
    if how == "in place":
        with torch.no_grad():
            quantizer.max.mul_(0.25)
    elif how == ".data":
        quantizer.max.data.mul_(0.25)
    elif how == "optimizer":
        quantizer.max.grad = 0.75 * quantizer.max.detach()
        torch.optim.SGD([quantizer.max], lr=1.0).step()
    else:
        quantizer.load_state_dict(quantizer.state_dict() | {"max": quantizer.max.detach() * 0.25})
    with torch.no_grad():
        after = quantizer(x)
    fresh = affine_params(quantizer.min.detach(), quantizer.max.detach(), quantizer.spec)
    assert not torch.equal(after, before)
    assert torch.equal(after, fake_quantize(x, fresh))


@pytest.mark.parametrize("axis", [None, 0])
def test_evaluation_equals_training_forward(axis: int | None, x: Tensor) -> None:
    quantizer = calibrated(x, QuantSpec(axis=axis))
    with torch.no_grad():
        evaluated = quantizer(2 * x)
    assert torch.equal(quantizer(2 * x), evaluated)


# ---- calibrations that must fail ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus inf"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_that_are_not_finite_are_refused_by_name(estimator: str, bad: float) -> None:
    def calibrate() -> None:
        for x in (torch.ones(3), torch.tensor([1.0, bad]), torch.ones(3)):
            quantizer(x)
        quantizer.finish_estimating()

    quantizer = FakeQuantizer(QuantSpec(estimator=estimator), "some.edge")
    quantizer.state = State.ESTIMATING
    with pytest.raises(CalibrationError, match=r"some\.edge.*finite"):
        calibrate()


def test_a_range_too_wide_for_float32_is_refused_by_name() -> None:
    quantizer = FakeQuantizer(QuantSpec(), "here")
    quantizer.state = State.ESTIMATING
    quantizer(torch.tensor([-3e38, 3e38]))
    with pytest.raises(CalibrationError, match=r"here: .*width to be finite"):
        quantizer.finish_estimating()
    assert quantizer.state is State.OFF


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_observed_is_refused_by_name(estimator: str) -> None:
    quantizer = FakeQuantizer(QuantSpec(estimator=estimator), "some.edge")
    quantizer.state = State.ESTIMATING
    with pytest.raises(CalibrationError, match=r"some\.edge.*no values"):
        quantizer.finish_estimating()


def test_finishing_what_was_not_started_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"some\.edge.*not started"):
        FakeQuantizer(QuantSpec(), "some.edge").finish_estimating()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_unclamped_mask_is_refused_with_the_cure(estimator: str) -> None:
    scores = torch.randn(50)
    scores[20:] = torch.finfo(torch.float32).min
    with pytest.raises(CalibrationError, match=r"some\.edge.*mask_clamp"):
        calibrated(scores, QuantSpec(estimator=estimator), MaskedScoreQuantizer)


@pytest.mark.parametrize(("spec", "channels"), [(QuantSpec(), 3), (QuantSpec(axis=0), None)], ids=["no axis", "axis"])
def test_axis_and_channel_count_come_together(spec: QuantSpec, channels: int | None) -> None:
    with pytest.raises(ValueError, match=r"some\.edge: axis"):
        FakeQuantizer(spec, "some.edge", channels)
