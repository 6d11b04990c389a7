"""Small seeded models and batches that every test shares; nothing is downloaded."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from quantsim import QuantConfig, QuantSim, trace

VOCAB = 99
LABELS = torch.tensor([0, 1, 1, 0])

HEADS: dict[str, type[nn.Module]] = {
    name: getattr(transformers, name)
    for name in (
        "BertModel",
        "BertForSequenceClassification",
        "BertForQuestionAnswering",
        "BertForTokenClassification",
        "BertForMaskedLM",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "BertForPreTraining",
    )
}


def tiny_config(**changes: Any) -> BertConfig:
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # wide enough that scores and logits differ from each other
    }
    return BertConfig(**(defaults | changes))


def tiny_bert(head: type[nn.Module] = BertForSequenceClassification, seed: int = 0, attention: str = "eager", **changes: Any) -> nn.Module:
    """A two-layer BERT in eval mode with random weights, LayerNorm's gamma and beta and every bias among them."""
    torch.manual_seed(seed)
    model = head(tiny_config(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    model.set_attn_implementation(attention)
    return model


def tiny_head(head: str) -> nn.Module:
    """A model by the name of its class; one layer is enough where the head is what is tested."""
    return tiny_bert(HEADS[head], num_hidden_layers=2 if head == "BertForSequenceClassification" else 1)


def tiny_batch(rows: int = 4, length: int = 10, seed: int = 0, choices: int | None = None) -> dict[str, Tensor]:
    """Ids, a padding mask (the last rows are shorter, where there is room) and two segments."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length) if choices is None else (rows, choices, length)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    mask[rows // 2 :, ..., max(1, length * 2 // 3) :] = 0
    segments = torch.zeros(shape, dtype=torch.long)
    segments[..., length // 2 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


def batch_for(head: str, rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    return tiny_batch(rows, length, seed, choices=3 if head == "BertForMultipleChoice" else None)


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors of a ``ModelOutput`` by name."""
    return {name: x for name, x in output.items() if isinstance(x, Tensor)}


def clone(sim: QuantSim) -> QuantSim:
    """An independent copy without another trace."""
    return copy.deepcopy(sim)


@cache
def _traced(head: str) -> tuple[nn.Module, torch.fx.GraphModule]:
    model = tiny_head(head)
    return model, trace(model)


@cache
def _sim(head: str, config: QuantConfig, calibrated: bool) -> QuantSim:
    if not calibrated:
        model, graph = copy.deepcopy(_traced(head))  # most of the time goes into the trace, which is that of every config
        with patch("quantsim.sim.simulation.trace", return_value=graph):
            return QuantSim(model, config, in_place=True)
    sim = clone(_sim(head, config, False))
    sim.compute_encodings([batch_for(head, seed=seed) for seed in (1, 2)])
    if head == "BertForSequenceClassification" and config.name == "aimet":
        sim.model(**tiny_batch(), labels=LABELS)  # the loss is traced once for all tests
    return sim


def tiny_sim(head: str = "BertForSequenceClassification", config: QuantConfig | str = "aimet", calibrated: bool = True) -> QuantSim:
    """A simulation of ``tiny_head(head)`` that the test may change; the trace behind it is made once."""
    return clone(_sim(head, QuantConfig.preset(config) if isinstance(config, str) else config, calibrated))


@cache
def _graph(layers: int) -> torch.fx.GraphModule:
    return trace(tiny_bert(num_hidden_layers=layers))


def tiny_graph(layers: int = 2) -> torch.fx.GraphModule:
    """The traced graph of a sequence classifier, for the test to rewrite."""
    return copy.deepcopy(_graph(layers))
