"""The training loop: it learns, it resumes bit for bit, and quantization-aware training lowers the loss."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from quantsim import QuantConfig, QuantSim, QuantSpec, State
from recipes.base_model import set_dropouts
from recipes.losses import label_loss, logits_of
from recipes.low_rank import add_low_rank
from recipes.quantized_stages import range_schedule
from recipes.recipe import Qat, Training
from recipes.tasks import TASKS, RecipeError
from recipes.training import Job, checkpoints, parameter_groups, train
from tests.tiny import clone

SETTINGS = Training(lr=5e-3, epochs=3, batch=8, hidden_dropout=0.1)


def tiny(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertForSequenceClassification(config)
    model.train(False)
    return model


def rows(count: int = 36) -> list[dict[str, Any]]:
    """The label is whether token 7 leads; lengths differ."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        tail = torch.randint(8, 50, (4 + i % 5,), generator=generator).tolist()
        found.append({"input_ids": [7 if i % 2 else 6, *tail], "labels": i % 2})
    return found


def collate(batch: Sequence[Any]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["labels"] for row in batch])}


def job(model: torch.nn.Module, folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": model,
        "task": TASKS["rte"],
        "rows": rows(),
        "collate": collate,
        "loss": label_loss,
        "settings": SETTINGS,
        "folder": folder,
        "seed": 3,
        "by_length": True,
        "device": "cpu",
    }
    return Job(**(values | changes))


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    return label_loss(model.eval(), collate(rows()))[0].item()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def before_step(now: int, total: int) -> None:
        if now == step:
            raise Killed

    return before_step


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_lowers_the_loss_and_is_deterministic(tmp_path: Path, precision: Any) -> None:
    settings = Training(lr=5e-3, epochs=6, batch=8, mixed_precision=precision)
    first, second = tiny(), tiny()
    before = loss_of(first)
    train(job(first, tmp_path / "a", settings=settings))
    train(job(second, tmp_path / "b", settings=settings))
    assert loss_of(first) < before / 2
    assert same(first, second)


@pytest.mark.parametrize("step", [7, 10, 14], ids=["in the second epoch", "at an epoch's end", "in the last epoch"])
@pytest.mark.parametrize("save_steps", [None, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, step: int, save_steps: int | None, accumulate: int) -> None:
    settings = Training(lr=5e-3, epochs=3, batch=8, accumulate=accumulate)
    whole, killed = tiny(), tiny()
    train(job(whole, tmp_path / "whole", settings=settings))
    with pytest.raises(Killed):
        train(job(killed, tmp_path / "killed", settings=settings, save_steps=save_steps, before_step=kill_at(step)))
    (tmp_path / "killed" / ".saving").mkdir()  # a checkpoint that was being written
    resumed = tiny()
    torch.manual_seed(99)
    train(job(resumed, tmp_path / "killed", settings=settings, save_steps=save_steps))
    assert same(whole, resumed)
    assert len(checkpoints(tmp_path / "killed")) == 1


@pytest.mark.parametrize("kill", [7, 10, None], ids=["in an epoch", "at its end", "after the last step"])
def test_a_killed_run_ends_with_the_same_average(tmp_path: Path, kill: int | None) -> None:
    settings = Training(lr=5e-3, epochs=3, batch=8, average=0.9)
    plain, whole, killed, resumed = (tiny() for _ in range(4))
    train(job(plain, tmp_path / "plain", settings=Training(lr=5e-3, epochs=3, batch=8)))
    train(job(whole, tmp_path / "whole", settings=settings))
    assert not same(plain, whole)
    if kill is None:
        train(job(killed, tmp_path / "killed", settings=settings))
    else:
        with pytest.raises(Killed):
            train(job(killed, tmp_path / "killed", settings=settings, save_steps=3, before_step=kill_at(kill)))
    train(job(resumed, tmp_path / "killed", settings=settings, save_steps=3))
    assert same(whole, resumed)


def test_a_finished_run_is_taken_from_its_checkpoint(tmp_path: Path) -> None:
    first, second = tiny(), tiny()
    train(job(first, tmp_path))
    train(job(second, tmp_path, before_step=kill_at(-1)))
    assert same(first, second)
    assert checkpoints(tmp_path)[-1].name == "step-15"


def test_max_steps(tmp_path: Path) -> None:
    train(job(tiny(), tmp_path, max_steps=2))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2"]


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no rows"):
        train(job(tiny(), tmp_path, rows=[]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BertForSequenceClassification:
    model = tiny()
    train(job(model, tmp_path_factory.mktemp("trained"), settings=Training(lr=5e-3, epochs=3, batch=8)))
    return model


def calibrated(model: BertForSequenceClassification, low_rank: bool = True) -> QuantSim:
    """Few bits, so that much is lost."""
    model = copy.deepcopy(model)
    set_dropouts(model, 0.0, 0.0)
    if low_rank:
        add_low_rank(model, rank=4)
    sim = QuantSim(model, QuantConfig(weights=QuantSpec(bits=2, symmetric=True), activations=QuantSpec(bits=4)))
    sim.compute_encodings([{k: x for k, x in collate(rows()).items() if k != "labels"}])
    return sim


@pytest.fixture(scope="module")
def simulations(trained: BertForSequenceClassification) -> dict[bool, QuantSim]:
    """``calibrated(trained, low_rank)`` by ``low_rank``, traced once, for tests to take copies of."""
    return {low_rank: calibrated(trained, low_rank) for low_rank in (True, False)}


def qat_job(sim: QuantSim, folder: Path, **changes: Any) -> Job:
    def freeze_late(step: int, total: int) -> None:
        if step >= total * 0.7 and sim.range_parameters():
            sim.freeze_ranges()

    values = {"settings": Qat(lr=5e-3, epochs=4, batch=8), "ranges": sim.range_parameters(), "range_lr": 1e-2, "before_step": freeze_late}
    return job(sim.model, folder, **(values | changes))


@pytest.mark.parametrize("low_rank", [True, False], ids=["low_rank", "full"])
def test_qat_lowers_the_loss_and_moves_ranges(tmp_path: Path, simulations: dict[bool, QuantSim], low_rank: bool) -> None:
    sim = clone(simulations[low_rank])
    before, ranges = loss_of(sim.model), {q: (q.min.detach().clone(), q.max.detach().clone()) for q in sim.quantizers.values()}
    train(qat_job(sim, tmp_path))
    assert loss_of(sim.model) < before * 0.9
    assert not [q.name for q, (low, high) in ranges.items() if torch.equal(q.min, low) and torch.equal(q.max, high)]
    assert not sim.range_parameters()


def test_killed_qat_resumes_with_ranges_and_their_state(tmp_path: Path, simulations: dict[bool, QuantSim]) -> None:
    whole, killed, resumed = (clone(simulations[True]) for _ in range(3))
    train(qat_job(whole, tmp_path / "whole"))
    freeze = qat_job(killed, tmp_path / "killed")

    def freeze_and_die(step: int, total: int) -> None:
        if step == 17:
            raise Killed
        freeze.before_step(step, total)  # type: ignore[misc]

    with pytest.raises(Killed):
        train(qat_job(killed, tmp_path / "killed", before_step=freeze_and_die))
    train(qat_job(resumed, tmp_path / "killed"))
    assert same(whole.model, resumed.model)


def test_parameter_groups_hold_every_trained_parameter_once(tmp_path: Path) -> None:
    sim = calibrated(tiny())
    groups = parameter_groups(qat_job(sim, tmp_path, settings=Qat(lr=1e-2, whole_lr=1e-3, weight_decay=0.1, epochs=1, batch=8)))
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in sim.model.parameters() if p.requires_grad)
    by_id = {id(p): group for group in groups for p in group["params"]}
    names = dict(sim.model.named_parameters())
    linear = "bert.encoder.layer.0.attention.self.query.parametrizations.weight.0.up"
    shown = (linear, "classifier.weight", "classifier.bias")
    rates = {name: (by_id[id(names[name])]["lr"], by_id[id(names[name])]["weight_decay"]) for name in shown}
    assert rates == {linear: (1e-2, 0.1), "classifier.weight": (1e-3, 0.1), "classifier.bias": (1e-3, 0.0)}
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in sim.range_parameters()}
    assert (groups[-1]["lr"], groups[-1]["weight_decay"]) == (1e-2, 0.0)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_passes_are_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    """Also where the last batch does not divide: the gradient is that of the mean over all its rows."""
    models = [tiny(dropout=0.0), tiny(dropout=0.0)]
    for parts, model in zip((1, accumulate), models, strict=True):
        train(job(model, tmp_path / str(parts), settings=Training(lr=1e-3, epochs=1, batch=6, accumulate=parts), rows=rows(16)))
    one, other = (logits_of(model, collate(rows())) for model in models)  # not weights: Adam makes steps of a key bias's rounding noise
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_half_an_epoch(tmp_path: Path) -> None:
    train(job(tiny(), tmp_path, settings=Training(lr=1e-3, epochs=0.5, batch=4)))
    assert checkpoints(tmp_path)[-1].name == "step-4"  # 36 rows are 9 batches


def test_evaluations_are_logged_and_change_nothing(tmp_path: Path) -> None:
    plain, watched = tiny(), tiny()
    seen: list[bool] = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        seen.append(model.training)
        torch.rand(3)
        return {"accuracy": 50.0 + len(seen)}

    train(job(plain, tmp_path / "plain"))
    train(job(watched, tmp_path / "watched", evaluate=evaluate, eval_steps=4))
    assert same(plain, watched)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    evaluated = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    assert evaluated == [(4, 51.0), (8, 52.0), (12, 53.0), (15, 54.0)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(RecipeError, match=r"train: the loss is nan in step 1; lower the learning rate \(0\.005\)"):
        train(job(model, tmp_path))
    assert not checkpoints(tmp_path)


def test_the_bar_shows_loss_and_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(job(tiny(), tmp_path, settings=Training(lr=5e-3, epochs=6, batch=8), evaluate=lambda _: {"accuracy": 12.5}, eval_steps=5))
    shown = capsys.readouterr().err
    assert re.search(r"train: .*loss=\d\.\d{4}, accuracy=\d+\.\d", shown)


def test_delayed_quantization_then_learning_then_fixed_ranges(simulations: dict[bool, QuantSim]) -> None:
    sim = clone(simulations[True])
    calibrations: list[int] = []
    settings = Qat(lr=1e-3, epochs=1, batch=8, delay=0.4, freeze_ranges_last=0.3)

    def recalibrate(sim: QuantSim) -> None:
        calibrations.append(1)
        sim.compute_encodings([{k: x for k, x in collate(rows()).items() if k != "labels"}])

    before_step = range_schedule(sim, settings, recalibrate)
    states = []
    for step in range(10):
        before_step(step, 10)
        (state,) = {q.state for q in sim.quantizers.values()}
        states.append(state)
    assert states == [State.OFF] * 4 + [State.LEARNING] * 3 + [State.FIXED] * 3
    assert calibrations == [1]


def test_killed_in_or_after_the_delay_resumes(tmp_path: Path, simulations: dict[bool, QuantSim]) -> None:
    def delayed(sim: QuantSim, folder: Path, kill: int | None = None) -> Job:
        settings = Qat(lr=5e-3, epochs=2, batch=8, delay=0.5, freeze_ranges_last=0.2)
        schedule = range_schedule(sim, settings, lambda sim: sim.compute_encodings([collate(rows())]))

        def before_step(step: int, total: int) -> None:
            if step == kill:
                raise Killed
            schedule(step, total)

        return qat_job(sim, folder, settings=settings, before_step=before_step, save_steps=1)

    whole = clone(simulations[True])
    train(delayed(whole, tmp_path / "whole"))
    for kill in (2, 5, 6):  # in the delay, at the calibration, after it
        killed, resumed = clone(simulations[True]), clone(simulations[True])
        with pytest.raises(Killed):
            train(delayed(killed, tmp_path / str(kill), kill))
        train(delayed(resumed, tmp_path / str(kill)))
        assert same(whole.model, resumed.model)
