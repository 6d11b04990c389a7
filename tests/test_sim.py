"""QuantSim from the outside: off is the model, calibration takes what users have, training trains, copies are copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantsim import CalibrationError, LoweringError, QuantConfig, QuantSim, Rule, State
from quantsim.sim import resolve_config
from tests.tiny import HEADS, LABELS, VOCAB, batch_for, tensors_of, tiny_batch, tiny_bert, tiny_head, tiny_sim

UNCLAMPED = QuantConfig(mask_clamp=None, rules=(Rule(op="mask_add", enabled=False),), name="unclamped")


def snapshot(sim: QuantSim) -> dict[str, tuple[State, float, float]]:
    return {name: (q.state, q.min.sum().item(), q.max.sum().item()) for name, q in sim.quantizers.items()}


# ---- off ----


@pytest.mark.parametrize(("rows", "length"), [(4, 10), (1, 1), (3, 21)])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_before_calibration_and_without_padding_it_is_bitwise_the_model(head: str, rows: int, length: int) -> None:
    batch = batch_for(head, rows, length)
    batch["attention_mask"].fill_(1)
    actual, expected = tiny_sim(head, calibrated=False).model(**batch), tiny_head(head)(**batch)
    assert type(actual) is type(expected)
    for name, x in tensors_of(expected).items():
        assert torch.equal(actual[name], x), name


@torch.no_grad()
def test_off_and_unclamped_is_bitwise_the_model_with_padding_too() -> None:
    sim, batch = tiny_sim(config=UNCLAMPED), tiny_batch()
    expected = tiny_bert()(**batch).logits
    assert not torch.equal(sim.model(**batch).logits, expected)
    with sim.quantizers_off():
        assert torch.equal(sim.model(**batch).logits, expected)
    assert not torch.equal(sim.model(**batch).logits, expected)


def fails_if_off(sim: QuantSim) -> None:
    if {q.state for q in sim.quantizers.values()} == {State.OFF}:
        raise TypeError


def test_quantizers_off_restores_every_state_after_an_error() -> None:
    sim = tiny_sim()
    sim.quantizers["classifier.output"].state = State.FIXED
    before = snapshot(sim)
    with pytest.raises(TypeError), sim.quantizers_off():
        fails_if_off(sim)
    assert snapshot(sim) == before


def test_the_model_that_was_given_stays_as_it_is() -> None:
    model = tiny_bert(num_hidden_layers=1, attention="sdpa").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    QuantSim(model).compute_encodings([tiny_batch()])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert model.training
    assert "forward" not in model.__dict__


def test_in_place_quantizes_this_very_model() -> None:
    model = tiny_bert(num_hidden_layers=1)
    assert QuantSim(model, in_place=True).model is model


# ---- calibrate ----


def through_a_loader(batches: list[dict[str, Tensor]]) -> DataLoader:
    rows = [{name: x[i] for name, x in batch.items()} for batch in batches for i in range(4)]
    return DataLoader(rows, batch_size=4)


def through_a_callable(batches: list[dict[str, Tensor]]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for batch in batches:
            model(**batch)

    return run


@pytest.mark.parametrize("form", [iter, through_a_loader, through_a_callable], ids=["generator", "DataLoader", "callable"])
def test_every_form_of_data_gives_the_ranges_of_a_list(form) -> None:
    batches = [tiny_batch(seed=seed) for seed in (1, 2)]
    expected, sim = tiny_sim(), tiny_sim(calibrated=False)
    sim.compute_encodings(form(batches))
    assert snapshot(sim) == snapshot(expected)
    assert {q.state for q in sim.quantizers.values()} == {State.LEARNING}


def test_the_callable_gets_the_other_arguments() -> None:
    seen = []

    def run(model: nn.Module, *args: object) -> None:
        seen.append(args)
        model(**tiny_batch())

    tiny_sim(calibrated=False).compute_encodings(run, 3, "x")
    assert seen == [(3, "x")]


def test_labels_and_other_columns_are_ignored() -> None:
    sim, batch = tiny_sim(calibrated=False), tiny_batch()
    sim.compute_encodings([batch | {"labels": torch.arange(4), "idx": torch.arange(4)}])
    other = tiny_sim(calibrated=False)
    other.compute_encodings([batch])
    assert snapshot(sim) == snapshot(other)


def used_up() -> list[dict[str, Tensor]]:
    batches = iter([tiny_batch()])
    next(batches)
    return batches  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batches"),
        (used_up(), "used up"),
        ([tiny_batch(), {name: x[:0] for name, x in tiny_batch().items()}], "batch 1 is empty"),
        ([tuple(tiny_batch().values())], "batch 0 is a tuple.*keyword"),
        ([tiny_batch()["input_ids"]], "batch 0 is a Tensor.*keyword"),
        (lambda model: None, "no values were observed"),
    ],
    ids=["empty list", "used-up generator", "empty batch", "tuple batch", "tensor batch", "idle callable"],
)
@pytest.mark.parametrize("calibrated", [False, True], ids=["fresh", "calibrated"])
def test_data_that_cannot_calibrate_is_refused_and_changes_nothing(data, message: str, calibrated: bool) -> None:
    sim = tiny_sim(calibrated=calibrated)
    before = snapshot(sim)
    with pytest.raises(CalibrationError, match=message):
        sim.compute_encodings(data)
    assert snapshot(sim) == before


def test_an_error_of_the_callers_own_changes_nothing() -> None:
    sim = tiny_sim()
    before = snapshot(sim)

    def run(model: nn.Module) -> None:
        model(**tiny_batch(seed=8))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sim.compute_encodings(run)
    assert snapshot(sim) == before


@pytest.mark.parametrize("estimator", ["min_max", "percentile"])
def test_weights_that_are_not_finite_are_refused_by_name(estimator: str) -> None:
    sim = tiny_sim(calibrated=False)
    quantizer = sim.quantizers["bert.pooler.dense.weight"]
    quantizer.spec = replace(quantizer.spec, estimator=estimator)
    with torch.no_grad():
        sim.model.bert.pooler.dense.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"bert\.pooler\.dense\.weight.*finite"):
        sim.compute_encodings([tiny_batch()])


def test_calibration_runs_in_eval_mode_and_restores_training() -> None:
    sim = tiny_sim(calibrated=False)
    sim.model.train()
    sim.compute_encodings([tiny_batch(seed=seed) for seed in (1, 2)])
    assert sim.model.training
    assert snapshot(sim) == snapshot(tiny_sim())


def test_freeze_ranges_stops_learning_alone() -> None:
    sim = tiny_sim()
    assert len(sim.range_parameters()) == 2 * len(sim.quantizers)
    ranges = {name: values[1:] for name, values in snapshot(sim).items()}
    sim.freeze_ranges()
    assert sim.range_parameters() == []
    assert snapshot(sim) == {name: (State.FIXED, *values) for name, values in ranges.items()}


# ---- evaluate ----


@torch.no_grad()
def test_evaluation_is_deterministic() -> None:
    sim, batch = tiny_sim(), tiny_batch()
    first = sim.model(**batch).logits.clone()
    assert all(torch.equal(sim.model(**batch).logits, first) for _ in range(3))


@torch.no_grad()
def test_inputs_are_left_as_they_are() -> None:
    batch = tiny_batch()
    before = {name: x.clone() for name, x in batch.items()}
    tiny_sim().model(**batch)
    assert all(torch.equal(batch[name], x) for name, x in before.items())


@torch.no_grad()
def test_without_the_clamp_batch_composition_changes_nothing() -> None:
    sim, batch = tiny_sim(config=UNCLAMPED), tiny_batch(4, 10)
    together = sim.model(**batch).logits
    for i in range(4):
        length = int(batch["attention_mask"][i].sum())
        alone = sim.model(**{name: x[i : i + 1, :length] for name, x in batch.items()}).logits
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_four_more_bits_are_much_nearer_to_the_model() -> None:
    """On the batch of the calibration, so that nothing is clipped: a step 16 times finer leaves less than a quarter of the noise."""
    batch = tiny_batch()
    expected, noise = tiny_bert()(**batch).logits, []
    for bits in (8, 12, 16):
        sim = tiny_sim(config=UNCLAMPED, calibrated=False)
        for q in sim.quantizers.values():
            q.spec = replace(q.spec, bits=bits)
        sim.compute_encodings([batch])
        noise.append(((sim.model(**batch).logits - expected).norm() / expected.norm()).item())
    assert noise[0] < 0.05
    assert noise[0] > 4 * noise[1] > 16 * noise[2]


# ---- copies ----


@torch.no_grad()
def test_a_deep_copy_of_the_model_is_equal_and_independent() -> None:
    sim, batch = tiny_sim(), tiny_batch()
    before = sim.model(**batch).logits.clone()
    other = copy.deepcopy(sim.model)
    assert torch.equal(other(**batch).logits, before)
    for p in other.parameters():
        p.mul_(0.5)
    assert not torch.equal(other(**batch).logits, before)
    assert torch.equal(sim.model(**batch).logits, before)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in sim.model.parameters()}


@torch.no_grad()
def test_state_dict_carries_ranges_and_states_to_another_simulation() -> None:
    sim, other, batch = tiny_sim(), tiny_sim(calibrated=False), tiny_batch()
    other.model.load_state_dict(sim.model.state_dict())
    assert snapshot(other) == snapshot(sim)
    assert torch.equal(other.model(**batch).logits, sim.model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("module", ["bert.embeddings.word_embeddings", "bert.encoder.layer.1.output.dense", "classifier"])
def test_nan_in_a_weight_is_nan_in_the_outputs(module: str) -> None:
    """A training that diverged: no integer hides it, and no integers are made of it."""
    sim, name = tiny_sim(), f"{module}.weight"
    sim.model.get_parameter(name)[0] = math.nan
    sim.model.get_parameter(name)[VOCAB // 2 :] = math.nan
    assert sim.model(**tiny_batch()).logits.isnan().any()
    with pytest.raises(LoweringError, match=f"{name}: holds numbers that are not finite"):
        sim.lower()
    if name.endswith("embeddings.weight"):
        assert sim.model(**tiny_batch()).logits.isnan().all()


@torch.no_grad()
def test_a_range_that_is_not_finite_is_named() -> None:
    sim = tiny_sim()
    name = next(name for name in sim.quantizers if name.startswith("bert.encoder.layer.0.intermediate") and "weight" not in name)
    sim.quantizers[name].max.fill_(math.nan)
    assert sim.model(**tiny_batch()).logits.isnan().all()
    with pytest.raises(LoweringError, match=f"the range of {name}: holds numbers"):
        sim.lower()


def test_an_evaluation_for_inference_leaves_a_simulation_that_trains() -> None:
    sim = tiny_sim()
    sim.freeze_ranges()
    sim.model.eval()
    with torch.inference_mode():
        sim.model(**tiny_batch())
    sim.model.train()
    sim.model(**tiny_batch(), labels=LABELS).loss.backward()
    sim.model.eval()
    for p in sim.model.parameters():
        p.requires_grad_(p.ndim == 1)
    with torch.inference_mode():
        sim.model(**tiny_batch())
    sim.model(**tiny_batch(), labels=LABELS).loss.backward()


def test_a_calibration_leaves_every_module_its_own_mode() -> None:
    sim = QuantSim(tiny_bert())
    sim.model.train()
    sim.model.bert.encoder.eval()
    sim.compute_encodings([tiny_batch()])
    assert sim.model.training
    assert not sim.model.bert.encoder.training


def test_inputs_that_are_no_tensors_and_that_the_trace_leaves_out() -> None:
    sim = QuantSim(tiny_bert())
    lists = {name: x.tolist() for name, x in tiny_batch().items()}
    with pytest.raises(
        CalibrationError, match=r"batch 0: input_ids is a list; expected a tensor \(of a tokenizer by return_tensors='pt'\)"
    ):
        sim.compute_encodings([lists])
    with pytest.warns(UserWarning, match="position_ids: left out of the calibration, for the model was traced with input_ids"):
        sim.compute_encodings([tiny_batch() | {"position_ids": torch.arange(10)[None], "head_mask": None}])


def test_a_folder_of_a_presets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_config("deploy") == QuantConfig.preset("deploy")


def test_a_model_in_bf16_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    sim = QuantSim(tiny_bert().bfloat16())
    sim.compute_encodings([tiny_batch()])
    sim.save_pretrained(tmp_path)
    again = QuantSim.from_pretrained(tmp_path)
    assert again.model.classifier.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again.model(**tiny_batch()).logits, sim.model(**tiny_batch()).logits)


def test_a_trace_with_inputs_of_ones_own_is_made_again(tmp_path: Path) -> None:
    batch = tiny_batch() | {"position_ids": torch.arange(10)[None].expand(4, 10).contiguous()}
    sim = QuantSim(tiny_bert(), example_inputs=batch)
    sim.compute_encodings([batch])
    sim.save_pretrained(tmp_path)
    again = QuantSim.from_pretrained(tmp_path, example_inputs=batch)
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, sim.model(**batch).logits)
