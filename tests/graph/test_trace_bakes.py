"""What torch.export bakes into a graph or cannot follow in training, and what is made of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import LayoutLMConfig, LayoutLMForTokenClassification, PretrainedConfig

from quantsim import QuantConfig, QuantSim, TraceError, trace
from quantsim.graph.example_inputs import example_inputs, other_shape


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))


class Numbers(Inner):
    """Tensors made of numbers and of a size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) / torch.sqrt(torch.tensor(x.shape[1], dtype=torch.float))


class DropsLayers(Inner):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.linear(x))
        return x if self.training and torch.rand(()) < 0.5 else h + x


class KeepsStatistics(Inner):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.max(self.seen, x.abs().max())
            assert self.seen.isfinite()
        return self.dropout(self.linear(x))


class BranchesInBoth(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Model(nn.Module):
    def __init__(self, inner: type[Inner]) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.inner = inner()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


@pytest.fixture
def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 6, 4)}


def test_tensors_of_numbers_are_buffers_that_are_not_saved(example: dict[str, Tensor]) -> None:
    model = Model(Numbers).eval()
    graph = trace(model, example)
    other = {"x": torch.randn(3, 9, 4)}
    assert torch.equal(graph(**other)["logits"], model(**other)["logits"])
    assert graph.state_dict().keys() == model.state_dict().keys()
    sim = QuantSim(model, QuantConfig(), example)
    assert set(sim.model.state_dict()) - set(model.state_dict()) == {
        name for name in sim.model.state_dict() if name.startswith("quantizers.")
    }
    assert {x.device.type for x in sim.model.to("meta").buffers()} == {"meta"}, "constants move with the model"
    assert graph.to("meta")(x=torch.empty(2, 3, 4, device="meta"))["logits"].device.type == "meta"


@pytest.mark.parametrize("inner", [DropsLayers, KeepsStatistics], ids=lambda c: c.__name__)
def test_what_training_alone_does_is_left_out_with_a_warning(inner: type[Inner], example: dict[str, Tensor]) -> None:
    model = Model(inner).train()
    with pytest.warns(UserWarning, match=r"(?s)Model is traced as it evaluates: its dropout layers stay live.*because"):
        graph = trace(model, example)
    assert model.training
    assert graph.training
    assert type(model.inner.seen) is Tensor
    assert model.inner.seen == 0
    first, second = (graph(**example)["logits"] for _ in range(2))
    assert not torch.equal(first, second), "dropout is live"
    model.eval()
    graph.eval()
    assert torch.equal(graph(**example)["logits"], model(**example)["logits"])


def test_a_model_that_is_traced_in_training_warns_of_nothing(example: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(Model(Numbers), example)


def test_a_refusal_names_the_line_and_prints_nothing(example: dict[str, Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TraceError, match=r"at test_trace_bakes\.py:\d+, ``return self\.linear\(x\) if x\.sum\(\) > 0 else x``: .*data-dependent"
    ) as refused:
        trace(Model(BranchesInBoth), example)
    assert len(str(refused.value)) < 600
    assert capfd.readouterr() == ("", "")


class NeedsThird(nn.Module):
    """Of three inputs the second may be left out, the third not."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, kinds: Tensor | None = None) -> dict[str, Tensor]:
        h = self.table(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        return {"logits": h + self.table(kinds)}  # type: ignore[arg-type]


def test_a_required_input_may_come_after_an_optional_one() -> None:
    ids = torch.randint(0, 9, (2, 5))
    model = NeedsThird().eval()
    graph = trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "kinds": ids.flip(0)})
    assert torch.equal(graph(input_ids=ids, kinds=ids)["logits"], model(input_ids=ids, kinds=ids)["logits"])
    with pytest.raises(TypeError, match="kinds"):
        graph(input_ids=ids)


# ---- boxes ----


@pytest.fixture(scope="module")
def layout() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LayoutLMForTokenClassification(LayoutLMConfig(**sizes, max_position_embeddings=32, max_2d_position_embeddings=50)).eval()
    model.set_attn_implementation("eager")
    return model


def test_a_model_of_pages_gets_boxes(layout: nn.Module) -> None:
    boxes = example_inputs(layout)["bbox"]
    assert boxes.shape == (2, 12, 4)
    assert 0 <= boxes.min() <= boxes.max() < 50
    assert (boxes[..., 0] <= boxes[..., 2]).all()
    assert (boxes[..., 1] <= boxes[..., 3]).all()
    assert other_shape(example_inputs(layout))["bbox"].shape == (3, 11, 4)


def test_boxes_may_be_given_and_left_out(layout: nn.Module) -> None:
    graph = trace(layout)
    ids = torch.randint(3, 99, (3, 7))
    boxes = torch.randint(0, 25, (3, 7, 4)).cumsum(-1) % 25
    boxes[..., 2:] = boxes[..., :2] + 10
    with torch.no_grad():
        for batch in ({"input_ids": ids}, {"input_ids": ids, "bbox": boxes}):
            assert torch.equal(graph(**batch).logits, layout(**batch).logits)
        assert not torch.equal(graph(input_ids=ids).logits, graph(input_ids=ids, bbox=boxes).logits)
