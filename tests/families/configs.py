"""Encoder families as data: the name of each, its ``model_type`` in transformers, and a config of two narrow layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT: Mapping[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # wide enough that scores and logits differ from each other
}
IMAGE: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Family:
    """An encoder family.

    Attributes:
        name: what the table calls it.
        model_type: its key in transformers' auto mappings.
        config: fields of its config, on top of ``TEXT`` or ``IMAGE``.
        base: ``TEXT``, ``IMAGE``, or nothing where the family has other names for these fields.
        named: issue 5 names it; the others were tried when the library was done.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    named: bool = True


FAMILIES = (
    Family("BERT", "bert"),
    Family("RoBERTa", "roberta"),
    Family("DistilBERT", "distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    Family("ELECTRA", "electra", {"embedding_size": 16}),
    Family("ALBERT", "albert", {"embedding_size": 16}),
    Family("MobileBERT", "mobilebert", {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}),
    Family("DeBERTa", "deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}),
    Family("DeBERTa-v2", "deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3}),
    Family(
        "DeBERTa-v3",
        "deberta-v2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    Family("ModernBERT", "modernbert", {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8, "initializer_cutoff_factor": 2.0}),
    Family("MPNet", "mpnet"),
    Family("CamemBERT", "camembert"),
    Family("XLM-RoBERTa", "xlm-roberta"),
    Family("Megatron-BERT", "megatron-bert"),
    Family("RemBERT", "rembert", {"input_embedding_size": 16, "output_embedding_size": 24}),
    Family("I-BERT", "ibert"),
    Family("LayoutLM", "layoutlm"),
    Family("ViT", "vit", base=IMAGE),
    Family("DeiT", "deit", base=IMAGE),
)
