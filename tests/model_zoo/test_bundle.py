"""Bundles: what was written is what is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from model_zoo.bundle import apply_delta, in_half, load_float, load_simulation, read_delta, write_delta
from model_zoo.cards import Card
from model_zoo.format import FP32, W8A8
from quantsim import CheckpointError, QuantConfig, QuantSim, State
from tests.model_zoo.tiny_bundle import LINEAR, tuned
from tests.tiny import tiny_batch, tiny_bert


def test_the_float_model_is_the_one_that_was_written(bundle: Card, base: Path) -> None:
    torch.manual_seed(5)
    expected, _ = tuned(base)
    loaded = load_float(bundle)
    assert not loaded.training
    assert {name: x.tolist() for name, x in loaded.state_dict().items()} == {name: x.tolist() for name, x in expected.state_dict().items()}


def test_the_simulation_is_the_one_that_was_written(bundle: Card, base: Path) -> None:
    torch.manual_seed(5)
    sim = QuantSim(tuned(base)[0], QuantConfig.preset("aimet"))
    sim.compute_encodings([tiny_batch(rows=8, length=24, seed=6)])
    loaded = load_simulation(bundle)
    assert {q.state for q in loaded.quantizers.values()} == {State.FIXED}
    with torch.no_grad():
        batch = tiny_batch(seed=9)
        assert torch.equal(loaded.model(**batch).logits, sim.model(**batch).logits)
        assert not torch.equal(loaded.model(**batch).logits, load_float(bundle)(**batch).logits)


def test_loading_draws_no_random_numbers(bundle: Card) -> None:
    before = torch.random.get_rng_state()
    load_simulation(bundle)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_apply_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_bert()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    up, down, bias = torch.randn(16, 2), torch.randn(2, 16), torch.tensor([3.0, 4.0])
    write_delta(tmp_path / "delta", {f"{LINEAR}.low_rank.up": up, f"{LINEAR}.low_rank.down": down, "classifier.bias": bias})
    apply_delta(model, tmp_path / "delta")
    expected = before | {LINEAR: before[LINEAR] + up @ down, "classifier.bias": bias}
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_ranges_are_left_aside(tmp_path: Path) -> None:
    write_delta(tmp_path / "delta", {"classifier.bias": torch.zeros(2), "quantizers.x.min": torch.zeros(())})
    assert set(read_delta(tmp_path / "delta").ranges) == {"x.min"}
    apply_delta(tiny_bert(), tmp_path / "delta")


def test_float16_is_how_weights_are_stored_and_not_how_they_are_used(tmp_path: Path) -> None:
    model = tiny_bert()
    before = model.state_dict()[LINEAR].clone()
    up, down, bias = torch.randn(16, 2), torch.randn(2, 16), torch.tensor([0.1, 1e6])
    tensors = {f"{LINEAR}.low_rank.up": up, f"{LINEAR}.low_rank.down": down, "classifier.bias": bias, "quantizers.x.min": -torch.rand(3)}
    write_delta(tmp_path / "delta", in_half(tensors))
    written = read_delta(tmp_path / "delta")
    assert [x.dtype for x in written.low_rank[LINEAR]] == [torch.float16] * 2
    assert torch.equal(written.whole["classifier.bias"], bias)  # 1e6 is more than float16 holds
    assert torch.equal(written.ranges["x.min"], tensors["quantizers.x.min"])
    apply_delta(model, tmp_path / "delta")
    state = model.state_dict()
    assert state[LINEAR].dtype == torch.float32
    assert torch.equal(state[LINEAR], before + up.half().float() @ down.half().float())
    assert torch.equal(state["classifier.bias"], bias)


def test_rounding_to_float16_is_as_small_as_said() -> None:
    weights = torch.cat([x * torch.logspace(-9, 4, 4001) for x in (torch.ones(4001), -torch.rand(4001))])
    error = (in_half({"a": weights})["a"].float() - weights).abs()
    assert (error <= torch.maximum(weights.abs() * 2**-11, torch.tensor(2.0**-25))).all()
    assert error.max() > 0
    assert in_half({"a": torch.tensor([3])})["a"].dtype == torch.int64


def test_views_are_written_as_their_values(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_delta(tmp_path / "delta", {"a": matrix.T, "b": matrix[0]})
    whole = read_delta(tmp_path / "delta").whole
    assert torch.equal(whole["a"], matrix.T)
    assert torch.equal(whole["b"], matrix[0])


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "delta"
    write_delta(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def breaks(tensors: object, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(OSError, match="disk full"):
        write_delta(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensors to write"),
        ({"a": torch.tensor([1.0, torch.inf])}, "a holds 1 values that are not finite"),
        ({"a.low_rank.up": torch.ones(2, 1)}, r"no tensor a\.low_rank\.down beside its other half"),
        ({"a.low_rank.up": torch.ones(2, 1), "a.low_rank.down": torch.ones(2, 2)}, r"\[2, 1\] @ \[2, 2\]; expected"),
        ({"a": torch.ones(1), "a.low_rank.up": torch.ones(2, 1), "a.low_rank.down": torch.ones(1, 2)}, "whole and as a low-rank pair"),
    ],
)
def test_what_cannot_be_read_is_not_written(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_delta(tmp_path / "delta", tensors)
    assert not list(tmp_path.iterdir())


def test_a_base_elsewhere_is_found_by_its_loader(bundle: Card, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    asked = []
    load_float(bundle, lambda name: asked.append(name) or str(tmp_path / "copy"))  # type: ignore[func-returns-value]
    assert asked == [bundle.base_model["name"]]


def test_a_bundle_is_small(bundle: Card) -> None:
    sizes = {name: (bundle.folder / name).stat().st_size for name in (FP32, W8A8)}
    assert sizes[FP32] < sizes[W8A8] < 30_000


def test_everybody_may_read_it(bundle: Card) -> None:
    assert all((bundle.folder / name).stat().st_mode & 0o044 == 0o044 for name in (FP32, W8A8))
