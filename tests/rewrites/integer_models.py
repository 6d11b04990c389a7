"""Tiny random encoders of several families, with the batch that calibrates them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantsim import QuantSim

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
DISTIL = {
    "vocab_size": 99,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
BUILT_ON = {"Bert": SMALL, "Roberta": SMALL, "DistilBert": DISTIL, "Electra": SMALL | {"embedding_size": 8}}
UNSEEN = {"RemBert": SMALL | {"input_embedding_size": 8}, "Ernie": SMALL, "LayoutLM": SMALL}
"""Families whose source and graphs nobody looked at while the rewrite was written."""
FAMILIES = BUILT_ON | UNSEEN


def model_of(family: str, head: str = "ForSequenceClassification", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | changes))
    model: nn.Module = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[rows // 2 :, max(1, length * 2 // 3) :] = 0
    return {"input_ids": torch.randint(3, 99, (rows, length), generator=generator), "attention_mask": mask}


@cache
def _simulated(family: str, head: str) -> QuantSim:
    sim = QuantSim(model_of(family, head), "ibert")
    sim.compute_encodings([batch_of(seed=1), batch_of(seed=2)])
    return sim


def simulated(family: str, head: str = "ForSequenceClassification") -> QuantSim:
    """A calibrated simulation that the test may change."""
    return copy.deepcopy(_simulated(family, head))
