"""A small random I-BERT in quant_mode → our integers: the same float model, its ranges, no float left, outputs close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, IBertConfig, IBertForSequenceClassification, IBertModel

from quantsim import CheckpointError, find_floats
from quantsim.ibert import as_roberta, from_ibert
from tests.rewrites.integer_models import SMALL, batch_of


def reference(cls: type[nn.Module] = IBertForSequenceClassification, quant_mode: bool = True, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = cls(IBertConfig(**SMALL, quant_mode=quant_mode))
    model.train()
    with torch.no_grad():
        for seed in range(steps):  # ranges move in training alone
            model(**batch_of(seed=seed))
    return model.eval()


def test_the_floating_point_model_is_the_same():
    model = reference(quant_mode=False, steps=0)
    with torch.no_grad():
        torch.testing.assert_close(as_roberta(model)(**batch_of()).logits, model(**batch_of()).logits, rtol=1e-4, atol=1e-5)


def test_every_range_is_that_of_the_reference():
    model = reference()
    sim = from_ibert(model)
    for name, act in (
        ("roberta.embeddings.LayerNorm.output", model.ibert.embeddings.output_activation),
        ("roberta.encoder.layer.1.attention.self.key.output", model.ibert.encoder.layer[1].attention.self.key_activation),
        ("roberta.encoder.layer.0.intermediate.intermediate_act_fn.output", model.ibert.encoder.layer[0].pre_output_act),
    ):
        scale = sim.quantizers[name].affine_params().scale
        torch.testing.assert_close(scale, torch.maximum(act.x_min.abs(), act.x_max.abs()).squeeze() / 127)
    weight = model.ibert.encoder.layer[0].output.dense
    scale = sim.quantizers["roberta.encoder.layer.0.output.dense.weight"].affine_params().scale
    torch.testing.assert_close(scale, weight.weight.abs().amax(1) / 127)
    assert all(quantizer.calibrated for quantizer in sim.quantizers.values())


@pytest.mark.parametrize("cls", [IBertForSequenceClassification, IBertModel])
def test_it_becomes_integers(cls):
    model = reference(cls)
    integers = from_ibert(model).integer_only()
    assert find_floats(integers.graph, batch_of()) == []
    with torch.no_grad():
        found, expected = integers.model(**batch_of())[0], as_roberta(model)(**batch_of())[0]
    assert (found - expected).square().sum() < 0.03 * expected.square().sum()


def test_a_folder_is_read(tmp_path: Path):
    model = reference()
    model.save_pretrained(tmp_path)
    ours, again = from_ibert(model), from_ibert(tmp_path)
    with torch.no_grad():
        assert torch.equal(ours.integer_only().model(**batch_of()).logits, again.integer_only().model(**batch_of()).logits)


def test_ranges_that_were_never_set_are_refused():
    with pytest.raises(CheckpointError, match=r"ibert.embeddings.output_activation: x_min and x_max are -1e-05 and 1e-05"):
        from_ibert(reference(steps=0))


def test_another_kind_of_model_is_refused(tmp_path: Path):
    model = BertModel(BertConfig(**SMALL))
    with pytest.raises(CheckpointError, match=r"model_type is 'bert'; expected 'ibert'"):
        from_ibert(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model_type is 'bert'"):
        from_ibert(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a model of transformers"):
        from_ibert(tmp_path / "nothing")
