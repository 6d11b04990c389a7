"""A small BERT with the disease that post-training methods are for: a few channels of the residual sum far larger than the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantsim import PostTraining, QuantConfig, QuantSim
from tests.tiny import tiny_batch, tiny_bert

BATCHES = [tiny_batch(rows=8, seed=seed) for seed in (1, 2, 3)]
OTHERS = [tiny_batch(rows=8, seed=seed) for seed in (11, 12)]
CHANNELS = (3, 10)


@cache
def _sick() -> nn.Module:
    model: Any = tiny_bert(hidden_size=32, num_attention_heads=4)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for block in (layer.attention.output, layer.output):
                block.dense.bias[list(CHANNELS)] += torch.tensor([30.0, -20.0])
                block.dense.weight[list(CHANNELS)] *= 8
                block.LayerNorm.weight[list(CHANNELS)] *= 0.2
    return model


def sick_bert() -> nn.Module:
    """Shared: QuantSim copies it."""
    return _sick()


def simulate(config: QuantConfig | None = None, **post_training: Any) -> QuantSim:
    config = replace(config or QuantConfig.preset("aimet"), post_training=PostTraining(**post_training))
    sim = QuantSim(sick_bert(), config)
    sim.compute_encodings(BATCHES)
    return sim


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Tensor]] = OTHERS) -> Tensor:
    return torch.cat([model(**batch).logits for batch in batches]).clone()


def noise(sim: QuantSim) -> float:
    """The mean square of what quantization changes of the logits, on rows that calibration did not see."""
    with sim.quantizers_off():
        reference = logits(QuantSim(sick_bert(), replace(sim.config, post_training=PostTraining())).model)
    return float((logits(sim.model) - reference).double().square().mean())
