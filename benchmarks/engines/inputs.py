"""The models and batches that every engine gets."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

MODELS = {
    "BERT-base": {},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
"""By name: what differs from ``BertConfig``'s defaults. Weights are random: speed doesn't depend on them."""


def batch(rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids without padding, as the attention of all engines does the same work then."""
    ids = torch.randint(1000, 30000, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def write_model(name: str, folder: Path) -> None:
    """A checkpoint of the model, and batches to calibrate with."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**MODELS[name])).save_pretrained(folder)
    torch.save([batch(4, 64, seed) for seed in range(4)], folder / "calibration.pt")


def operations(name: str, rows: int, tokens: int) -> float:
    """Multiplications and additions in the linears of one forward: what int8 kernels take over."""
    config = BertConfig(**MODELS[name])
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return 2.0 * rows * (tokens * config.num_hidden_layers * layer + config.hidden_size**2 + 2 * config.hidden_size)
