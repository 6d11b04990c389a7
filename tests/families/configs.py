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
        sees: how far apart two tokens may be that see each other: an attention over windows ends there, a causal one at 1.
        named: the library was built with it in view; the others were tried afterwards, as they are.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    named: bool = True
    sees: int = 5


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
    Family(
        "ModernBERT",
        "modernbert",
        {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8, "initializer_cutoff_factor": 2.0},
    ),
    Family("MPNet", "mpnet"),
    Family("CamemBERT", "camembert"),
    Family("XLM-RoBERTa", "xlm-roberta"),
    Family("Megatron-BERT", "megatron-bert"),
    Family("RemBERT", "rembert", {"input_embedding_size": 16, "output_embedding_size": 24}),
    Family("I-BERT", "ibert"),
    Family("LayoutLM", "layoutlm"),
    Family("ViT", "vit", base=IMAGE),
    Family("DeiT", "deit", base=IMAGE),
    # ---- not looked at before the library was done ----
    Family("BertGeneration", "bert-generation", {"bos_token_id": 2, "eos_token_id": 1}, named=False),
    Family("ERNIE", "ernie", named=False),
    Family("Splinter", "splinter", {"question_token_id": 4}, named=False),
    Family("LiLT", "lilt", {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64}, named=False),
    Family("Data2VecText", "data2vec-text", named=False),
    Family("RoFormer", "roformer", {"embedding_size": 32}, named=False),
    Family("NomicBERT", "nomic_bert", named=False),
    Family("EuroBERT", "eurobert", {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, named=False),
    Family("ESM", "esm", {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 3}, named=False),
    Family("SqueezeBERT", "squeezebert", {"embedding_size": 32}, named=False),
    Family("ConvBERT", "convbert", {"embedding_size": 32, "conv_kernel_size": 3}, named=False),
    Family("FNet", "fnet", named=False),
    Family(
        "Funnel", "funnel", {"vocab_size": 99, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64}, {}, False
    ),
    Family("XLNet", "xlnet", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, {}, False),
    Family("XLM", "xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 2}, named=False),
    Family("Nystromformer", "nystromformer", named=False),
    Family("YOSO", "yoso", {"use_expectation": True}, named=False),
    Family("BigBird", "big_bird", {"attention_type": "block_sparse", "block_size": 4}, named=False),
    Family("Longformer", "longformer", {"attention_window": 4}, named=False),
    Family("CLIP text", "clip_text_model", {"bos_token_id": 1, "eos_token_id": 2}, named=False, sees=1),
    Family("CLIP vision", "clip_vision_model", base=IMAGE, named=False),
    Family("BEiT", "beit", base=IMAGE, named=False),
    Family("DINOv2", "dinov2", base=IMAGE, named=False),
    Family(
        "Swin",
        "swin",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 16, "patch_size": 2},
        {},
        False,
    ),
    Family("ConvNeXT", "convnext", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 32}, {}, False),
)
