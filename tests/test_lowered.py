"""The lowered model as its users hold it: transformers' outputs, save and load, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file

from quantsim import CheckpointError, LoweringError, QuantSim
from quantsim.kernels import cpu
from quantsim.kernels.cpu import missing_for_int8
from tests.formats.sealed import describe, description, edit_tensors
from tests.tiny import LABELS, tensors_of, tiny_batch, tiny_sim


def test_it_takes_and_gives_what_the_model_does():
    sim = tiny_sim()
    lowered = sim.lower()
    batch = tiny_batch(seed=5)
    expected, found = sim.model(**batch), lowered.model(**batch)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0.05)
    assert isinstance(lowered.model, type(sim.model))
    assert lowered.model.config.num_labels == 2
    as_tuple = lowered.model(batch["input_ids"], return_dict=False)
    assert isinstance(as_tuple, tuple)


def test_any_batch_and_length():
    lowered = tiny_sim().lower()
    for rows, length in ((1, 1), (7, 3), (2, 33)):
        assert lowered.model(**tiny_batch(rows, length)).logits.shape == (rows, 2)


def test_a_loss_that_the_simulation_had_traced():
    sim = tiny_sim()  # traced with LABELS
    lowered = sim.lower()
    with torch.no_grad():
        expected = sim.model(**tiny_batch(), labels=LABELS)
        found = lowered.model(**tiny_batch(), labels=LABELS)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)


def test_a_loss_that_it_had_not_is_refused():
    lowered = tiny_sim(config="deploy").lower()
    with pytest.raises(LoweringError, match=r"has no loss for labels.*before sim\.lower"):
        lowered.model(**tiny_batch(), labels=LABELS)


def test_training_is_refused():
    lowered = tiny_sim().lower()
    assert lowered.model.eval() is lowered.model
    assert copy.deepcopy(lowered.model).train(False).forward.graph is not lowered.graph
    with pytest.raises(LoweringError, match=r"Train the simulation"):
        lowered.model.train()
    assert not any(p.requires_grad for p in lowered.model.parameters())


@pytest.mark.parametrize("preset", ["aimet", "deploy", "aimet_per_tensor"])
def test_saved_as_integers_and_loaded(tmp_path, preset):
    sim = tiny_sim(config=preset)
    lowered = sim.lower()
    lowered.save_pretrained(tmp_path / "int8")
    sim.save_pretrained(tmp_path / "float")
    again = QuantSim.from_pretrained(tmp_path / "int8")
    batch = tiny_batch(seed=6)
    for name, x in tensors_of(lowered.model(**batch)).items():
        assert torch.equal(again.lower().model(**batch)[name], x)
        assert torch.equal(again.model(**batch)[name], sim.model(**batch)[name])
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("int8", "float")]
    assert sizes[0] < sizes[1]


def test_a_file_without_the_ranges_of_its_integers_is_refused(tmp_path):
    tiny_sim().lower().save_pretrained(tmp_path)
    edit_tensors(tmp_path, {"quantizers.classifier.weight.min": None})
    with pytest.raises(CheckpointError, match=r"classifier.weight is torch.int8; expected quantizers.classifier.weight.min"):
        QuantSim.from_pretrained(tmp_path)


def test_a_machine_without_exact_kernels_computes_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "_missing_on_cpu", lambda: "the kernels saturate")
    sim = tiny_sim()
    with pytest.warns(UserWarning, match=r"computed in float32.*the kernels saturate"):
        lowered = sim.lower()
    torch.testing.assert_close(lowered.model(**tiny_batch()).logits, sim.model(**tiny_batch()).logits, rtol=0, atol=0.05)
    assert "in float32" in str(lowered)
    assert "the kernels saturate" in str(lowered)


def test_printed(tmp_path):
    text = str(tiny_sim().lower())
    assert "10 int8 product" in text.splitlines()[0]
    assert "query.output + bert.encoder.layer.0.attention.self.key.output + " in text
    assert "4 exact float32 matmul" in text.splitlines()[0]
    assert ("no attention of 8 bits throughout" in text) == (not missing_for_int8())
    assert repr(tiny_sim().lower()).startswith("LoweredModel(BertForSequenceClassification, aimet: ")


def test_transformers_find_its_dtype_and_device():
    model = tiny_sim().lower().model
    assert model.dtype is torch.float32
    assert model.device == torch.device("cpu")
    assert model.num_parameters() == 0


def test_ways_to_save_that_cannot_hold_it_are_refused(tmp_path):
    model = tiny_sim().lower().model
    with pytest.raises(LoweringError, match=r"call save_pretrained of what sim\.lower\(\) gave"):
        model.save_pretrained(tmp_path)
    for write in (torch.save, pickle.dump):
        with pytest.raises(TypeError, match=r"can't be pickled.*save_pretrained"):
            write(model, io.BytesIO())
    with pytest.raises(TypeError, match=r"has no state_dict.*LoweredModel\.save_pretrained"):
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(TypeError, match=r"takes no state_dict: load it into the simulation"):
        model.load_state_dict(tiny_sim().model.state_dict())


def test_a_tied_weight_is_saved_once_as_integers(tmp_path):
    sim = tiny_sim("BertForMaskedLM")
    lowered = sim.lower()
    lowered.save_pretrained(tmp_path)
    shapes = {name: (x.dtype, x.shape) for name, x in load_file(tmp_path / "model.safetensors").items() if x.ndim > 1}
    assert {dtype for dtype, _ in shapes.values()} == {torch.int8}
    assert sum(shape[0] == sim.model.config.vocab_size for _, shape in shapes.values()) == 1
    again = QuantSim.from_pretrained(tmp_path)
    batch = tiny_batch(seed=6)
    assert torch.equal(again.model(**batch).logits, sim.model(**batch).logits)
    assert torch.equal(again.lower().model(**batch).logits, lowered.model(**batch).logits)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x.to(torch.uint8), r"classifier.weight is torch.uint8; expected torch.int8 from -128 to 127"),
        (lambda x: x[:0], r"classifier.weight is torch.int8; expected"),
    ],
    ids=["another type", "empty"],
)
def test_integers_that_are_not_the_quantizers_are_refused(tmp_path, make, message):
    tiny_sim().lower().save_pretrained(tmp_path)
    edit_tensors(tmp_path, {"classifier.weight": make(load_file(tmp_path / "model.safetensors")["classifier.weight"]).contiguous()})
    with pytest.raises(CheckpointError, match=message):
        QuantSim.from_pretrained(tmp_path)


def test_integers_along_an_axis_that_is_not_there_are_refused(tmp_path):
    tiny_sim().lower().save_pretrained(tmp_path)
    quantizers = description(tmp_path)["quantizers"]
    quantizers["classifier.weight"]["axis"] = 5
    describe(tmp_path, quantizers=quantizers)
    with pytest.raises(CheckpointError, match=r"classifier.weight.axis is 5; classifier.weight has 2 axes"):
        QuantSim.from_pretrained(tmp_path)
