"""A simulation takes and gives what the Hugging Face model does: labels and losses, tuples, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import LABELS, VOCAB, batch_for, tensors_of, tiny_batch, tiny_head, tiny_sim

ROWS, LENGTH = 4, 10


def ids_like(rows: int, length: int, high: int) -> Tensor:
    labels = torch.randint(0, high, (rows, length))
    labels[0, : length // 2] = -100
    return labels


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {  # name: head, config, labels for (rows, length)
    "two classes": ("BertForSequenceClassification", {}, lambda r, n: {"labels": torch.arange(r) % 2}),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}, lambda r, n: {"labels": torch.randn(r)}),
    "multi-label": ("BertForSequenceClassification", {}, lambda r, n: {"labels": torch.randint(0, 2, (r, 2)).float()}),
    "named regression": (
        "BertForSequenceClassification",
        {"problem_type": "regression"},
        lambda r, n: {"labels": torch.randn(r, 2)},
    ),
    "positions": (
        "BertForQuestionAnswering",
        {},
        lambda r, n: {"start_positions": torch.arange(r) % n, "end_positions": torch.tensor([n + 3] + [0] * (r - 1))},
    ),
    "tokens": ("BertForTokenClassification", {}, lambda r, n: {"labels": ids_like(r, n, 2)}),
    "words": ("BertForMaskedLM", {}, lambda r, n: {"labels": ids_like(r, n, VOCAB)}),
    "choices": ("BertForMultipleChoice", {}, lambda r, n: {"labels": torch.arange(r) % 3}),
    "next sentence": ("BertForNextSentencePrediction", {}, lambda r, n: {"labels": torch.arange(r) % 2}),
    "words and next sentence": (
        "BertForPreTraining",
        {},
        lambda r, n: {"labels": ids_like(r, n, VOCAB), "next_sentence_label": torch.arange(r) % 2},
    ),
}


def pair(case: str):
    """A simulation that is switched off, the model it is of, and the case's labels."""
    head, config, labels = CASES[case]
    if config.get("num_labels") == 1:
        from quantsim import QuantSim
        from tests.tiny import HEADS, tiny_bert

        model = tiny_bert(HEADS[head], num_labels=1, num_hidden_layers=1)
        return head, QuantSim(model), model, labels
    sim, model = tiny_sim(head, calibrated=False), tiny_head(head)
    for name, value in config.items():
        setattr(sim.model.config, name, value)
        setattr(model.config, name, value)
    return head, sim, model, labels


@pytest.mark.parametrize("case", CASES)
def test_loss_and_outputs_are_the_models(case: str) -> None:
    """On three shapes, so that the loss, traced on the first, is not fixed to it; one row comes first. The gradients too."""
    head, sim, model, labels = pair(case)
    for rows, length in [(1, 7), (ROWS, LENGTH), (2, 16)]:
        batch = batch_for(head, rows, length)
        batch["attention_mask"].fill_(1)
        batch |= labels(rows, length)
        actual, expected = sim.model(**batch), model(**batch)
        assert type(actual) is type(expected)
        assert list(actual) == list(expected)
        for name, x in tensors_of(expected).items():
            torch.testing.assert_close(actual[name], x, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert actual.loss.isfinite()
    actual.loss.backward()
    expected.loss.backward()
    own = dict(sim.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_tracing_the_loss_leaves_mode_and_forward_as_they_were() -> None:
    sim = tiny_sim("BertForTokenClassification", calibrated=False)
    sim.model.train()
    forward = sim.model.forward
    sim.model(**tiny_batch(), labels=torch.zeros(ROWS, LENGTH, dtype=torch.long))
    assert sim.model.training
    assert sim.model.forward is forward
    assert sim.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("labelled", [False, True], ids=["without labels", "with labels"])
def test_return_dict_false_gives_a_tuple(how: str, labelled: bool) -> None:
    sim, batch = tiny_sim(), tiny_batch()
    if labelled:
        batch["labels"] = LABELS
    expected = sim.model(**batch)
    if how == "config":
        sim.model.config.return_dict = False
        actual = sim.model(**batch)
    else:
        actual = sim.model(**batch, return_dict=False)
    assert isinstance(actual, tuple)
    assert len(actual) == (2 if labelled else 1)
    for a, b in zip(actual, expected.to_tuple(), strict=True):
        assert torch.equal(a, b)


def test_positional_inputs_are_taken_in_the_models_order() -> None:
    sim, batch = tiny_sim(), tiny_batch()
    by_place = sim.model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]).logits
    assert torch.equal(by_place, sim.model(**batch).logits)


@pytest.mark.parametrize("left_out", ["attention_mask", "token_type_ids"])
def test_optional_inputs_may_be_none(left_out: str) -> None:
    sim, batch = tiny_sim(), tiny_batch()
    fill = torch.ones if left_out == "attention_mask" else torch.zeros
    expected = sim.model(**(batch | {left_out: fill(ROWS, LENGTH, dtype=torch.long)})).logits
    assert torch.equal(sim.model(**(batch | {left_out: None})).logits, expected)


def test_an_input_the_graph_does_not_take_is_an_error_that_says_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"takes input_ids, attention_mask, token_type_ids, not 'position_ids'.*example_inputs"):
        tiny_sim().model(**tiny_batch(), position_ids=torch.arange(LENGTH)[None])


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_more_outputs_than_were_traced_are_an_error_and_none_are_not(flag: str) -> None:
    sim = tiny_sim()
    sim.model(**tiny_batch(), **{flag: False})
    with pytest.raises(TypeError, match=rf"not '{flag}'.*config"):
        sim.model(**tiny_batch(), **{flag: True})


def test_a_missing_input_is_an_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="input 'input_ids' is missing"):
        tiny_sim().model(attention_mask=torch.ones(2, 3, dtype=torch.long))


def test_labels_that_give_the_model_no_loss_give_none_here() -> None:
    batch = batch_for("BertForPreTraining", 2, 7)
    batch["attention_mask"].fill_(1)
    labels = {"labels": ids_like(2, 7, VOCAB)}  # of its two kinds of label, one
    assert tiny_head("BertForPreTraining")(**batch, **labels).loss is None
    assert tiny_sim("BertForPreTraining", calibrated=False).model(**batch, **labels).loss is None


# ---- a loss that is chosen by the labels' values ----


@pytest.fixture(scope="module")
def choosing() -> tuple[Any, Any]:
    from transformers import DebertaConfig, DebertaForSequenceClassification

    from quantsim import QuantSim

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = DebertaForSequenceClassification(DebertaConfig(**sizes, max_position_embeddings=32)).eval()
    return model, QuantSim(model)


def test_a_loss_chosen_by_the_values_of_labels_is_that_of_their_kind(choosing: tuple[Any, Any]) -> None:
    model, sim = choosing
    batch = {"input_ids": torch.randint(3, VOCAB, (4, 9)), "labels": torch.tensor([0, 1, 1, 0])}
    expected, actual = model(**batch), sim.model(**batch)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert sim.model.config.problem_type is None
