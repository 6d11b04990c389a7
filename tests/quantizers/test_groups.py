"""Ranges in groups of channels: who shares one, what it is, its gradients, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantsim import CheckpointError, ConfigError, QuantConfig, QuantSim, Rule, State
from quantsim.config import QuantSpec
from quantsim.numerics.affine import affine_params, fake_quantize
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from tests.formats.sealed import TENSORS, edit_tensors
from tests.tiny import tiny_batch, tiny_sim

GROUPED = QuantConfig.preset("aimet").with_rules(Rule(op="layer_norm", role="activation", set={"axis": -1, "groups": 3}))
EDGE = "bert.encoder.layer.0.output.LayerNorm.output"
WIDTHS = torch.tensor([9.0, 0.1, 1.0, 0.2, 7.0, 1.5, 0.15])


def calibrated(x: Tensor, **fields: object) -> FakeQuantizer:
    quantizer = FakeQuantizer(QuantSpec.from_dict({"axis": -1, "groups": 3, **fields}), "some.edge", x.shape[-1])
    quantizer.state = State.ESTIMATING
    quantizer(x)
    quantizer.finish_estimating()
    return quantizer


@pytest.fixture
def x() -> Tensor:
    return (torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) - 0.4) * WIDTHS


def test_channels_of_like_width_share_a_range(x: Tensor) -> None:
    quantizer = calibrated(x)
    assert quantizer.group_of is not None
    assert quantizer.group_of.tolist() == [2, 0, 1, 0, 2, 1, 0]
    for group, channels in enumerate([[1, 3, 6], [2, 5], [0, 4]]):
        assert (quantizer.min[group], quantizer.max[group]) == (x[:, channels].min(), x[:, channels].max())


def test_neighbours_share_a_range_by_order(x: Tensor) -> None:
    quantizer = calibrated(x, group_by="order")
    assert quantizer.group_of is not None
    assert quantizer.group_of.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert quantizer.max[1] == x[:, 3:5].max()


@pytest.mark.parametrize("estimator", ["min_max", "running_min_max", "percentile", "mse", "sqnr"])
def test_a_group_holds_what_the_estimator_finds_for_each_of_its_channels(estimator: str, x: Tensor) -> None:
    quantizer = calibrated(x, estimator=estimator, percentile=90.0)
    assert quantizer.group_of is not None
    for group in range(3):
        alone = [calibrated(x[:, [c]], estimator=estimator, percentile=90.0, groups=1) for c in (quantizer.group_of == group).nonzero()]
        assert quantizer.min[group] == min(q.min.min() for q in alone)
        assert quantizer.max[group] == max(q.max.max() for q in alone)


def test_quantizes_each_channel_on_its_groups_grid_and_a_group_learns_as_one(x: Tensor) -> None:
    quantizer = calibrated(x, bits=4)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(g)
    assert quantizer.min.grad is not None
    for group in range(3):
        low, high = (end.detach()[group].clone().requires_grad_() for end in (quantizer.min, quantizer.max))
        channels = quantizer.group_of == group
        part = fake_quantize(x[:, channels], affine_params(low, high, QuantSpec(bits=4)))
        assert torch.equal(quantizer(x)[:, channels], part)
        part.backward(g[:, channels])
        torch.testing.assert_close(quantizer.min.grad[group], low.grad)


def test_fewer_steps_are_lost_than_with_one_range(x: Tensor) -> None:
    """The largest error is half a step of the group, not of the tensor."""
    error = (calibrated(x)(x) - x).abs().amax(0)
    whole = FakeQuantizer(QuantSpec(), "whole")
    whole.restore(State.FIXED, {"min": x.min(), "max": x.max()})
    assert (error[WIDTHS < 0.3] < 0.04 * (whole(x) - x).abs().amax(0)[WIDTHS < 0.3]).all()


# ---- in a simulation ----


def test_saved_loaded_and_lowered_to_the_bit(tmp_path: Path) -> None:
    sim = tiny_sim(config=GROUPED)
    group_of = sim.quantizers[EDGE].group_of
    assert group_of is not None
    assert not torch.equal(group_of, group_of.sort().values)  # a permutation that has to be kept
    sim.save_pretrained(tmp_path / "sim")
    lowered = sim.lower()
    lowered.save_pretrained(tmp_path / "lowered")
    batch = tiny_batch(seed=3)
    with torch.no_grad():
        expected = sim.model(**batch).logits
        for folder in ("sim", "lowered"):
            assert torch.equal(QuantSim.from_pretrained(tmp_path / folder).model(**batch).logits, expected)
        torch.testing.assert_close(lowered.model(**batch).logits, expected)


def test_a_calibration_that_fails_leaves_the_groups_as_they_were() -> None:
    sim = tiny_sim(config=GROUPED)
    before = {name: x.clone() for name, x in sim.quantizers[EDGE].range_tensors().items()}
    with pytest.raises(RuntimeError):
        sim.compute_encodings([tiny_batch(seed=8), {"input_ids": torch.zeros(0, 4, dtype=torch.long)}])
    assert all(torch.equal(before[name], x) for name, x in sim.quantizers[EDGE].range_tensors().items())


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    tiny_sim(config=GROUPED).save_pretrained(tmp_path)
    key = f"quantizers.{EDGE}.group_of"
    group_of = load_file(tmp_path / TENSORS)[key]
    group_of[2] = 3
    edit_tensors(tmp_path, {key: group_of})
    with pytest.raises(CheckpointError, match=r"group_of is from 0 to 3; expected 0 to 2"):
        QuantSim.from_pretrained(tmp_path)


def test_aimet_files_leave_groups_out_and_say_so(tmp_path: Path) -> None:
    sim = tiny_sim(config=GROUPED)
    for version in ("torch", "1.0.0"):
        assert "groups" in sim.export_aimet_encodings(tmp_path / "x.json", version)[EDGE]
        assert EDGE not in (tmp_path / "x.json").read_text()
        assert EDGE not in sim.load_aimet_encodings(tmp_path / "x.json").loaded


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule(op="layer_norm", role="activation", set={"axis": -1, "groups": 17}),
            "17 groups; expected at most as many as axis -1 is long, 16",
        ),
        (Rule(op="linear", role="weight", set={"groups": 2}), "none for a weight"),
        (Rule(op="layer_norm", role="activation", set={"groups": 2}), "no axis"),
    ],
    ids=["too many", "weight", "no axis"],
)
def test_groups_that_mean_nothing_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_sim(config=QuantConfig.preset("aimet").with_rules(rule))


@pytest.mark.parametrize("groups", [0, -1, 1.5, True])
def test_a_number_of_groups_is_one(groups: object) -> None:
    with pytest.raises(ConfigError, match=r"QuantSpec\.groups"):
        QuantSpec.from_dict({"axis": -1, "groups": groups})


def test_specs_without_groups_are_written_as_before_there_were_any() -> None:
    assert not {"groups", "group_by"} & set(QuantSpec().to_dict())
    spec = QuantSpec(axis=-1, groups=4, group_by="order")
    assert QuantSpec.from_dict(spec.to_dict()) == spec
