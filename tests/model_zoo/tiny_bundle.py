"""A base model, a tokenizer and a bundle of a few kB, made as the real ones are; nothing is downloaded."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertModel, BertTokenizerFast, PreTrainedModel

from model_zoo.bundle import read_delta, write_delta
from model_zoo.cards import Card, file_records, read_card, write_card
from model_zoo.format import BUNDLED, FP32, W8A8
from quantsim import QuantConfig, QuantSim
from recipes.base_model import base_weights_sha256
from tests.tiny import tiny_batch, tiny_bert

MAX_LENGTH = 48
LINEAR = "bert.encoder.layer.0.attention.self.query.weight"
RANK = 2


def make_base(folder: Path) -> Path:
    """``folder`` holds a tiny ``BertModel`` and a tokenizer that spells words by letters."""
    tiny_bert(BertModel, seed=3).save_pretrained(folder)
    letters = string.ascii_lowercase + string.digits
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *".,'\"-%$?"]
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(file), model_max_length=512).save_pretrained(folder)
    return folder


def tuned(base: Path, num_labels: int = 2) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A classifier that differs from its base in a low-rank product, a norm and its head; and the tensors that say so."""
    model = tiny_bert(seed=4, num_labels=num_labels)
    assert isinstance(model, PreTrainedModel)
    whole = BertModel.from_pretrained(base)
    model.bert.load_state_dict(whole.state_dict())
    state = model.state_dict()
    up, down = torch.randn(state[LINEAR].shape[0], RANK), torch.randn(RANK, state[LINEAR].shape[1])
    norm = "bert.encoder.layer.1.output.LayerNorm.weight"
    with torch.no_grad():
        state[LINEAR] += up @ down
        state[norm] *= 1.5
    changed = {name: state[name].clone() for name in (norm, "classifier.weight", "classifier.bias")}
    return model.eval(), changed | {f"{LINEAR}.low_rank.up": up, f"{LINEAR}.low_rank.down": down}


def make_bundle(folder: Path, base: Path, name: str = "bert_w8a8_rte", task: str = "rte", num_labels: int = 2) -> Card:
    """A whole bundle of a random model in ``folder``."""
    torch.manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    model, delta = tuned(base, num_labels)
    sim = QuantSim(model, QuantConfig.preset("aimet"))
    sim.compute_encodings([tiny_batch(rows=8, length=24, seed=6)])
    ranges = {
        f"quantizers.{q}.{end}": getattr(quantizer, end).detach() for q, quantizer in sim.quantizers.items() for end in ("min", "max")
    }
    write_delta(folder / FP32, delta)
    write_delta(folder / W8A8, delta | ranges)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    write_card(card_of(folder, base, name, task, num_labels, sim.config), folder)
    return read_card(folder)


def card_of(folder: Path, base: Path, name: str, task: str, num_labels: int, config: QuantConfig) -> Card:
    figures = {"accuracy": 50.0, "rows": 277, "split": "validation"}
    return Card(
        name=name,
        task=task,
        where=BUNDLED,
        note="",
        framework="quantsim",
        base_model={
            "name": str(base),
            "hub_id": "none/none",
            "source": "made by the tests",
            "sha256": base_weights_sha256(str(base)),
            "revision": "",
        },
        recipe=f"recipes/bert_w8a8/{task}.yaml",
        hyper_parameters={"max_length": MAX_LENGTH},
        seed=5,
        quantization=config.to_dict(),
        num_labels=num_labels,
        metrics={"fp32": figures, "ptq": figures, "qat": figures},
        estimators={},
        sweep={},
        versions={},
        date="2000-01-01",
        licence="Apache-2.0",
        data="none",
        files=file_records(folder),
    )


def rewrite(card: Card, file: str, changes: dict[str, Tensor], drop: tuple[str, ...] = ()) -> Card:
    """The bundle with other tensors in one file and a card that vouches for them: a broken file whose hash is right."""
    delta = read_delta(card.folder / file)
    tensors = dict(delta.whole) | {f"quantizers.{name}": x for name, x in delta.ranges.items()}
    for name, (up, down) in delta.low_rank.items():
        tensors |= {f"{name}.low_rank.up": up, f"{name}.low_rank.down": down}
    tensors = {name: x for name, x in (tensors | changes).items() if name not in drop}
    write_delta(card.folder / file, tensors)
    return rehash(card)


def rehash(card: Card) -> Card:
    values = card.to_dict() | {"files": file_records(card.folder)}
    write_card(Card(**values), card.folder)
    return read_card(card.folder)
