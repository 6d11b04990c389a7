"""Inserted quantizers: one on each placed edge, a weight's on the edge that the weight comes in by, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertForMaskedLM, PretrainedConfig

from quantsim import FakeQuantizer, QuantConfig, QuantSim, QuantSpec, Rule, State
from quantsim.numerics.affine import affine_params, fake_quantize
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.rewrites.insert_quantizers import weights_of
from tests.tiny import HEADS, batch_for, tiny_batch, tiny_bert, tiny_sim

EMBEDDINGS = ["word_embeddings", "token_type_embeddings", "position_embeddings"]


@pytest.mark.parametrize("preset", ["aimet", "bondarenko"])
def test_every_placement_with_a_spec_has_its_quantizer_and_no_other_has(preset: str) -> None:
    sim = tiny_sim(config=preset, calibrated=False)
    inserted = {m.name: m for m in sim.model.modules() if isinstance(m, FakeQuantizer)}
    placed = {p.name: p for p in sim.placements if p.spec}
    assert inserted.keys() == placed.keys() == sim.quantizers.keys()
    for name, quantizer in inserted.items():
        assert quantizer.spec == placed[name].spec
        assert isinstance(quantizer, WeightQuantizer) == (placed[name].role == "weight")


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_forward_passes_every_quantizer(head: str) -> None:
    sim, seen = tiny_sim(head), set()
    for name, quantizer in sim.quantizers.items():
        quantizer.register_forward_hook(lambda *_, name=name: seen.add(name))
    sim.model(**batch_for(head))
    assert seen == set(sim.quantizers)


def test_weights_have_a_range_for_each_row() -> None:
    quantizers = tiny_sim(calibrated=False).quantizers
    assert quantizers["bert.encoder.layer.0.intermediate.dense.weight"].min.shape == (32,)
    assert quantizers["bert.encoder.layer.0.output.dense.weight"].min.shape == (16,)
    assert quantizers["bert.embeddings.word_embeddings.weight"].min.shape == ()


def test_weight_ranges_are_those_of_the_weights() -> None:
    sim = tiny_sim()
    q = sim.quantizers["bert.encoder.layer.1.attention.self.key.weight"]
    weight = sim.model.bert.encoder.layer[1].attention.self.key.weight
    assert torch.equal(q.min, weight.min(1).values)
    assert torch.equal(q.max, weight.max(1).values)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embeddings_range_is_that_of_the_whole_table(name: str) -> None:
    sim = tiny_sim()
    table = getattr(sim.model.bert.embeddings, name).weight
    q = sim.quantizers[f"bert.embeddings.{name}.weight"]
    assert (q.min.item(), q.max.item()) == (table.min().item(), table.max().item())


@torch.no_grad()
def test_looked_up_rows_quantized_are_rows_of_the_quantized_table() -> None:
    sim, seen = tiny_sim(), {}
    q = sim.quantizers["bert.embeddings.word_embeddings.weight"]
    q.register_forward_hook(lambda module, args, out: seen.update(out=out.clone()))
    batch = tiny_batch()
    sim.model(**batch)
    table = sim.model.bert.embeddings.word_embeddings.weight
    quantized = fake_quantize(table, affine_params(table.min(), table.max(), QuantSpec(symmetric=True)))
    assert torch.equal(seen["out"], quantized[batch["input_ids"]])


@torch.no_grad()
def test_the_simulation_is_the_model_run_on_quantized_weights_where_only_weights_are() -> None:
    config = QuantConfig(activations=None, mask_clamp=None, rules=(Rule(op="embedding", set={"axis": None}),), name="weights alone")
    sim, model = tiny_sim(config=config), tiny_bert()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            per_row = isinstance(module, nn.Linear)
            low, high = (weight.min(1).values, weight.max(1).values) if per_row else (weight.min(), weight.max())
            weight.copy_(fake_quantize(weight, affine_params(low, high, QuantSpec(symmetric=True, axis=0 if per_row else None))))
    batch = tiny_batch()
    assert torch.equal(sim.model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_quantizers_that_overwrite_change_no_value(training: bool) -> None:
    sim, plain = tiny_sim(), tiny_sim()
    for quantizer in plain.quantizers.values():
        quantizer.overwrites = False
    batch = tiny_batch(seed=5)
    with torch.set_grad_enabled(training):
        assert torch.equal(sim.model(**batch).logits, plain.model(**batch).logits)


class TakesViews(nn.Module):
    """``y`` is read again after a view of it was; ``x`` is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        views = (y.mT, y.swapaxes(0, 1), y.reshape_as(x), y.real)
        return {"views": sum(view.square().mean() for view in views), "logits": self.second(y)}


def test_views_and_inputs_are_never_overwritten() -> None:
    """What ``real`` gives is a view that the table of ops does not know, so that it has a quantizer, here of 2 bits."""
    batch = {"x": torch.randn(3, 4, 4)}
    sim = QuantSim(TakesViews().eval(), QuantConfig(rules=(Rule(op="real", set={"bits": 2}),)), batch)
    assert [p.op for p in sim.placements if p.op in ("mT", "swapaxes", "reshape_as")] == []
    sim.compute_encodings([batch])
    before = batch["x"].clone()
    expected = sim.model(**batch)["logits"].detach()
    with torch.no_grad():
        assert torch.equal(sim.model(**batch)["logits"], expected)
    assert torch.equal(batch["x"], before)


# ---- one weight in two places ----


def test_a_tied_decoder_has_one_weight_quantizer() -> None:
    sim = tiny_sim("BertForMaskedLM")
    word, decoder = sim.model.bert.embeddings.word_embeddings.weight, sim.model.cls.predictions.decoder.weight
    assert word is decoder
    on_it = [q for q, weight in weights_of(sim.graph) if weight is word]
    assert len(on_it) == 1
    assert on_it[0].spec.axis == 0, "the finer of the two that were asked for"
    seen = []
    on_it[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        sim.model(**tiny_batch())
    assert len(seen) == 2


def test_an_untied_decoder_has_its_own() -> None:
    sim = QuantSim(tiny_bert(BertForMaskedLM, num_hidden_layers=1, tie_word_embeddings=False))
    names = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert names <= sim.quantizers.keys()
    assert sim.quantizers["bert.embeddings.word_embeddings.weight"].spec.axis is None


# ---- computed weights ----


class LowRank(nn.Module):
    """``W + B @ A``."""

    def __init__(self, rows: int, columns: int, rank: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, columns) / 5), nn.Parameter(torch.randn(rows, rank) / 5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.fixture(scope="module")
def low_rank() -> QuantSim:
    model = tiny_bert(num_hidden_layers=1)
    for module in list(model.bert.encoder.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(*module.weight.shape))
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch(seed=1)])
    return sim


def test_a_computed_weight_has_a_quantizer_by_its_own_name(low_rank: QuantSim) -> None:
    plain = tiny_sim("BertForTokenClassification")
    encoder = [name for name in plain.quantizers if ".encoder." in name]
    assert [name for name in low_rank.quantizers if ".encoder." in name] == encoder


def test_the_range_of_a_computed_weight_is_that_of_its_value(low_rank: QuantSim) -> None:
    weight = low_rank.model.bert.encoder.layer[0].output.dense.weight
    q = low_rank.quantizers["bert.encoder.layer.0.output.dense.weight"]
    torch.testing.assert_close(q.max.detach(), weight.detach().max(1).values)


def test_a_low_rank_step_trains_a_and_b_and_changes_the_output(low_rank: QuantSim) -> None:
    batch = tiny_batch() | {"labels": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        before = low_rank.model(**batch).logits.clone()
    low_rank.model(**batch).loss.backward()
    factors = {name: p for name, p in low_rank.model.named_parameters() if name.endswith((".0.a", ".0.b"))}
    assert len(factors) == 12
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())
    torch.optim.SGD(factors.values(), lr=0.5).step()
    with torch.no_grad():
        assert not torch.equal(low_rank.model(**batch).logits, before)


def test_a_computed_weight_off_is_bitwise_the_model(low_rank: QuantSim) -> None:
    assert all(q.state is State.LEARNING for q in low_rank.quantizers.values())
    batch = tiny_batch()
    batch["attention_mask"].fill_(1)  # so that the clamp has nothing to do
    model = tiny_bert(num_hidden_layers=1)
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = low_rank.model.bert.encoder.get_submodule(name).weight.detach()
    with torch.no_grad(), low_rank.quantizers_off():
        assert torch.equal(low_rank.model(**batch).logits, model(**batch).logits)
