"""What cannot be traced is refused, with both outputs or with the reason; the model is then as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantsim import QuantSim, TraceError, trace
from tests.tiny import tiny_bert


class Tiny(nn.Module):
    """A model that ``trace`` would take, but for what a subclass does in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x)}


class BranchOnValues(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x) if x.sum() > 0 else x}


class CountsItsCalls(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"logits": self.linear(x) * self.calls}


class ChangesABuffer(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.add_(1)
        return {"logits": self.linear(x) + self.seen}


class DrawsANumber(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x) + torch.rand(())}


class FixesItsBatch(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x).view(2, 12, 4)}


class TakesTwoApart(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"logits": y.view(2, 12, 4) if x.shape[:2] == (2, 12) else y}


class LongIsDoubled(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"logits": y * 2 if x.shape[1] > 8 else y}


class VeryLongIsDoubled(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"logits": y * 2 if x.shape[1] >= 30 else y}


class NeedsThree(Tiny):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x.unfold(1, 3, 1).sum(-1))}


@pytest.fixture
def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 12, 4)}


def test_without_the_vice_it_is_traced(example: dict[str, Tensor]) -> None:
    model = Tiny().eval()
    graph = trace(model, example)
    assert torch.equal(graph(x=example["x"][:1, :3])["logits"], model(example["x"][:1, :3])["logits"])


def test_a_branch_on_input_values_says_why(example: dict[str, Tensor]) -> None:
    with pytest.raises(TraceError, match=r"BranchOnValues: torch\.export cannot follow .*'x'.*data-dependent"):
        trace(BranchOnValues().eval(), example)


@pytest.mark.parametrize("model_class", [CountsItsCalls, ChangesABuffer, DrawsANumber], ids=lambda c: c.__name__)
def test_hidden_state_shows_both_outputs(model_class: type[Tiny], example: dict[str, Tensor]) -> None:
    with pytest.raises(TraceError, match=rf"(?s){model_class.__name__}.*differs.*model: tensor\(.*graph: tensor\("):
        trace(model_class().eval(), example)


def test_a_model_that_fails_on_another_shape_is_a_trace_error(example: dict[str, Tensor]) -> None:
    with pytest.raises(TraceError, match=r"FixesItsBatch: the model itself fails on inputs .*shape '\[2, 12, 4\]' is invalid"):
        trace(FixesItsBatch().eval(), example)


def test_says_which_sizes_were_fixed(example: dict[str, Tensor]) -> None:
    with pytest.raises(TraceError, match=r"TakesTwoApart: the traced graph fails on inputs .*the model's code fixes axis 0 of x at 2: "):
        trace(TakesTwoApart().eval(), example)


@pytest.mark.parametrize(("model_class", "size"), [(LongIsDoubled, 8), (VeryLongIsDoubled, 30)], ids=["below", "above"])
def test_a_branch_on_the_length_is_refused_at_its_bound(model_class: type[Tiny], size: int, example: dict[str, Tensor]) -> None:
    with pytest.raises(TraceError, match=rf"(?s)\[2, {size}, 4\].*differs.*size of an input"):
        trace(model_class().eval(), example)


def test_a_length_that_the_model_itself_refuses_is_no_branch(example: dict[str, Tensor]) -> None:
    model = NeedsThree().eval()
    shortest = example["x"][:, :3]
    assert torch.equal(trace(model, example)(x=shortest)["logits"], model(shortest)["logits"])


def test_weights_that_are_not_finite_are_named_as_the_cause() -> None:
    model = tiny_bert(num_hidden_layers=1)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(TraceError, match=r"not finite.*weights"):
        trace(model)


def test_a_refused_model_is_as_it_was(example: dict[str, Tensor]) -> None:
    model = tiny_bert(num_hidden_layers=1, attention="sdpa").train()
    model.bert.embeddings.eval()
    model.config.return_dict = False
    before = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(TraceError):
        trace(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    assert model.config.return_dict is False


def test_a_model_without_config_needs_an_example() -> None:
    with pytest.raises(ValueError, match=r"Linear has no config.*example_inputs"):
        trace(nn.Linear(2, 2))


def test_unknown_inputs_need_an_example() -> None:
    with pytest.raises(ValueError, match=r"Tiny\.forward takes neither input_ids.*example_inputs"):
        trace(Tiny())


def test_a_simulation_of_a_simulation_is_refused(example: dict[str, Tensor]) -> None:
    sim = QuantSim(Tiny().eval(), example_inputs=example)
    with pytest.raises(ValueError, match="a simulation already"):
        QuantSim(sim.model, example_inputs=example)
