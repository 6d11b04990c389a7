"""What PyTorch's users do with any module: copy, move, convert, compile, save a state_dict, pickle."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from quantsim import QuantSim
from quantsim.hf import simulation_of
from tests.tiny import LABELS, tiny_batch, tiny_bert, tiny_sim


def logits(model: nn.Module) -> torch.Tensor:
    return model(**tiny_batch(seed=3)).logits


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any) -> None:
    sim = tiny_sim()
    expected = logits(sim.model).detach()
    with context():
        assert torch.equal(logits(sim.model), expected)
        assert torch.equal(logits(sim.model), expected)
    assert logits(sim.model).requires_grad


def test_a_state_dict_through_torch_save() -> None:
    sim, other, file = tiny_sim(), tiny_sim(calibrated=False), io.BytesIO()
    torch.save(sim.model.state_dict(), file)
    file.seek(0)
    other.model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other.model), logits(sim.model))
    assert not torch.equal(logits(other.model), logits(tiny_bert()))


def test_a_state_dict_that_is_assigned() -> None:
    sim, other = tiny_sim(), tiny_sim(calibrated=False)
    other.model.load_state_dict(copy.deepcopy(sim.model.state_dict()), assign=True)
    assert torch.equal(logits(other.model), logits(sim.model))
    other.model(**tiny_batch(), labels=LABELS).loss.backward()
    assert all(q.max.grad is not None for q in other.quantizers.values())


def test_a_copy_of_the_simulation_is_whole_and_independent() -> None:
    sim = tiny_sim()
    other = copy.deepcopy(sim)
    expected = logits(sim.model).detach()
    assert simulation_of(other.model) is other
    assert other.model.forward.graph is other.graph
    assert str(other) == str(sim)
    assert torch.equal(logits(other.lower().model), logits(sim.lower().model))
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(0.5)
    assert torch.equal(logits(sim.model), expected)
    assert not torch.equal(logits(other.model), expected)
    other.compute_encodings([tiny_batch()])


def test_a_copy_of_the_model_has_a_simulation_of_its_own() -> None:
    sim = tiny_sim()
    model = copy.deepcopy(sim.model)
    assert simulation_of(model).model is model
    assert simulation_of(model).quantizers["classifier.output"] is model.get_submodule("quantizers.classifier.output")
    assert torch.equal(logits(simulation_of(model).lower().model), logits(sim.lower().model))


def test_a_lowered_model_holds_no_simulation() -> None:
    lowered = tiny_sim().lower()
    with pytest.raises(ValueError, match="no simulated model"):
        simulation_of(lowered.model)


def test_a_wider_dtype() -> None:
    sim = tiny_sim()
    expected = logits(sim.model)
    found = logits(sim.model.to(torch.float64))
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_than_that_of_the_trace_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"is in {dtype} now and was traced in torch.float32.*QuantSim\(model.to\({dtype}\)\)"):
        logits(tiny_sim().model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    sim = QuantSim(tiny_bert(num_hidden_layers=1).to(dtype))
    sim.compute_encodings([tiny_batch()])
    found = sim.model(**tiny_batch(), labels=LABELS)
    found.loss.backward()
    assert found.logits.dtype is dtype
    assert sim.model.classifier.weight.grad.isfinite().all()


def test_under_autocast() -> None:
    sim = tiny_sim()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(sim.model)
    torch.testing.assert_close(found.float(), logits(sim.model), rtol=0, atol=0.3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_moves_between_devices(device: str) -> None:
    model = tiny_sim().model.to(device)
    assert {p.device.type for p in model.parameters()} == {device}
    assert {b.device.type for b in model.buffers()} == {device}


def test_compiled_with_one_graph() -> None:
    sim = tiny_sim()
    with torch.no_grad():
        expected = logits(sim.model)
        compiled = torch.compile(sim.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_is_refused_in_words(write: Any) -> None:
    with pytest.raises(TypeError, match=r"BertForSequenceClassification: .*can't be pickled; write it with save_pretrained"):
        write(tiny_sim().model, io.BytesIO())
