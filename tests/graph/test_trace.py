"""A trace is the model: same values bit for bit, same gradients, same parameters, whatever the shape of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from quantsim import trace
from tests.tiny import HEADS, batch_for, tensors_of, tiny_batch, tiny_bert, tiny_config, tiny_head

SHAPES = [pytest.param(rows, length, id=f"{rows}x{length}") for rows, length in [(4, 10), (1, 1), (1, 7), (3, 1), (2, 33), (5, 64)]]


@pytest.fixture(scope="module")
def traced() -> dict[str, tuple[nn.Module, fx.GraphModule]]:
    return {}


@pytest.fixture(params=HEADS)
def pair(request: pytest.FixtureRequest, traced) -> tuple[str, nn.Module, fx.GraphModule]:
    """A head, a model of it and the model's graph, which share their parameters; traced once a head."""
    head = request.param
    if head not in traced:
        model = tiny_head(head)
        traced[head] = (model, trace(model))
    model, graph = traced[head]
    model.eval()
    graph.eval()
    model.zero_grad()
    return head, model, graph


def assert_same(actual, expected) -> None:
    assert type(actual) is type(expected)
    a, b = tensors_of(actual), tensors_of(expected)
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@torch.no_grad()
def test_evaluation_is_bitwise_the_models(pair, rows: int, length: int) -> None:
    head, model, graph = pair
    batch = batch_for(head, rows, length)
    assert_same(graph(**batch), model(**batch))


@pytest.mark.parametrize("left_out", [("token_type_ids",), ("attention_mask",), ("attention_mask", "token_type_ids")], ids=" and ".join)
@torch.no_grad()
def test_optional_inputs_may_be_left_out(pair, left_out: tuple[str, ...]) -> None:
    head, model, graph = pair
    batch = {name: x for name, x in batch_for(head, 3, 9).items() if name not in left_out}
    assert_same(graph(**batch), model(**batch))


def test_training_forward_is_bitwise_the_models_with_the_same_seed(pair) -> None:
    head, model, graph = pair
    batch = batch_for(head, 3, 9)
    outputs = []
    for module in (model, graph):
        module.train()
        torch.manual_seed(7)
        outputs.append(module(**batch))
    assert_same(outputs[1], outputs[0])
    assert not torch.equal(outputs[0][0], model(**batch)[0]), "dropout is live: another draw gives another output"


def test_gradients_are_the_models(pair) -> None:
    head, model, graph = pair
    batch = batch_for(head, 3, 9)
    gradients = []
    for module in (model, graph):
        model.zero_grad()
        sum(x.square().sum() for x in tensors_of(module(**batch)).values()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_parameters_are_shared(pair) -> None:
    head, model, graph = pair
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in graph.parameters()} <= own
    batch = batch_for(head)
    with torch.no_grad():
        before = graph(**batch)[0]
        word = model.get_input_embeddings().weight
        word.mul_(1.5)
        assert not torch.equal(graph(**batch)[0], before)
        assert_same(graph(**batch), model(**batch))
        word.div_(1.5)


def test_parameters_keep_their_names(pair) -> None:
    _, model, graph = pair
    assert dict(graph.named_parameters()).keys() <= dict(model.named_parameters(remove_duplicate=False)).keys()


def test_a_deep_copied_graph_is_independent(pair) -> None:
    head, model, graph = copy.deepcopy(pair)
    other = copy.deepcopy(graph)
    batch = batch_for(head)
    with torch.no_grad():
        before = graph(**batch)
        assert_same(other(**batch), before)
        model.get_input_embeddings().weight.mul_(2)
        assert_same(other(**batch), before)
        assert not torch.equal(graph(**batch)[0], before[0])


def test_one_row_is_enough_of_an_example() -> None:
    model = tiny_bert(num_hidden_layers=1)
    graph = trace(model, tiny_batch(1, 6))
    with torch.no_grad():
        assert_same(graph(**tiny_batch(5, 20)), model(**tiny_batch(5, 20)))


@torch.no_grad()
def test_a_model_of_one_token_type() -> None:
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**tiny_config(num_hidden_layers=1).to_dict() | {"type_vocab_size": 1})).eval()
    model.set_attn_implementation("eager")
    graph = trace(model)
    batch = tiny_batch()
    del batch["token_type_ids"]
    assert_same(graph(**batch), model(**batch))


def test_a_graph_traced_without_a_mask_takes_none() -> None:
    model = tiny_bert(num_hidden_layers=1)
    batch = tiny_batch()
    graph = trace(model, {"input_ids": batch["input_ids"]})
    with torch.no_grad():
        assert_same(graph(input_ids=batch["input_ids"]), model(input_ids=batch["input_ids"]))
    with pytest.raises(TypeError, match="attention_mask"):
        graph(**batch)


# ---- the model is as it was ----


@pytest.fixture(scope="module")
def odd() -> tuple[nn.Module, fx.GraphModule, dict[str, bool], torch.Tensor]:
    """A traced model that had SDPA attention, returned tuples, and was in train mode but for its encoder; its modes, and a draw after."""
    model = tiny_bert(num_hidden_layers=1, attention="sdpa").train()
    model.bert.encoder.eval()
    model.config.return_dict = False
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    graph = trace(model)
    return model, graph, modes, torch.rand(4)


def test_plain_settings_are_restored(pair) -> None:
    _, model, _ = pair
    assert model.config._attn_implementation == "eager"
    assert model.config.return_dict is True
    assert not any(module.training for module in model.modules())


def test_attention_implementation_is_restored(odd) -> None:
    assert odd[0].config._attn_implementation == "sdpa"


def test_fused_attention_is_traced_in_its_eager_form(odd) -> None:
    model, graph, *_ = odd
    batch = tiny_batch()
    with torch.no_grad():
        graph, model = copy.deepcopy(graph).eval(), copy.deepcopy(model).eval()
        torch.testing.assert_close(graph(**batch).logits, model(**batch)[0], rtol=1e-4, atol=1e-5)


def test_return_dict_is_restored(odd) -> None:
    assert odd[0].config.return_dict is False


def test_modes_of_every_module_are_restored(odd) -> None:
    model, graph, modes, _ = odd
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert graph.training


def test_the_random_state_and_the_gradients_are_left_alone(odd) -> None:
    model, _, _, drawn = odd
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 10), (2, 1), (1, 1)], ids=str)
def test_an_example_with_axes_of_one_fixes_no_size(shape: tuple[int, int]) -> None:
    model = tiny_bert(num_hidden_layers=1)
    graph = trace(model, tiny_batch(*shape))
    with torch.no_grad():
        assert_same(graph(**tiny_batch(3, 8)), model(**tiny_batch(3, 8)))


def test_no_device_is_fixed() -> None:
    model = tiny_bert(num_hidden_layers=1)
    graph = trace(model)
    model.to("meta")
    batch = {name: x.to("meta") for name, x in tiny_batch().items()}
    assert graph(**batch)[0].device.type == "meta"
