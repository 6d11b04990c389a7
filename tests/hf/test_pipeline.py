"""``transformers.pipeline`` and ``SentenceTransformer`` run the simulated model and the lowered one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from quantsim import QuantSim
from tests.hf.words import TEXTS, tokenizer
from tests.tiny import HEADS, tiny_bert, tiny_sim

TASKS = {
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "fill-mask": "BertForMaskedLM",
    "feature-extraction": "BertModel",
    "question-answering": "BertForQuestionAnswering",  # newer ones have no pipeline of it
}


def run(task: str, model: Any) -> Any:
    pipe = pipeline(task, model=model, tokenizer=tokenizer())
    if task == "question-answering":
        return pipe(question="was the film good", context=TEXTS[3])
    return pipe([f"{text} [MASK]" for text in TEXTS] if task == "fill-mask" else TEXTS)


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_what_its_model_says(task: str) -> None:
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"transformers {transformers.__version__} has no pipeline {task}")
    sim = QuantSim(tiny_bert(HEADS[TASKS[task]], num_hidden_layers=1))
    uncalibrated = run(task, sim.model)
    sim.compute_encodings([tokenizer()(TEXTS, padding=True, return_tensors="pt")])
    simulated, lowered = run(task, sim.model), run(task, sim.lower().model)
    assert len(simulated) == len(uncalibrated) == len(lowered)
    assert simulated != uncalibrated
    if task == "text-classification":
        logits = [sim.model(**tokenizer()(text, return_tensors="pt")).logits[0].softmax(-1) for text in TEXTS]
        assert [answer["score"] for answer in simulated] == pytest.approx([x.max().item() for x in logits], abs=1e-6)
        assert [answer["score"] for answer in lowered] == pytest.approx([x.max().item() for x in logits], abs=0.02)


def test_a_pipeline_pads_its_batches() -> None:
    pipe = pipeline("text-classification", model=tiny_sim().model, tokenizer=tokenizer(), batch_size=4)
    assert len(pipe(TEXTS)) == len(TEXTS)


def test_a_sentence_transformer_encodes_with_it(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sim = QuantSim(tiny_bert(HEADS["BertModel"], num_hidden_layers=1))
    sim.compute_encodings([tokenizer()(TEXTS, padding=True, return_tensors="pt")])
    sim.save_pretrained(tmp_path / "bert", tokenizer=tokenizer())
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # with mean pooling
    found = encoder.encode(TEXTS[:1], convert_to_tensor=True)
    with torch.no_grad():
        states = sim.model(**tokenizer()(TEXTS[:1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found, states.mean(1), rtol=1e-5, atol=1e-6)
    encoder.save(str(tmp_path / "encoder"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS, convert_to_tensor=True))


def test_the_auto_class_of_a_task_finds_its_checkpoint(tmp_path: Path) -> None:
    sim = tiny_sim("BertForTokenClassification")
    sim.save_pretrained(tmp_path, tokenizer=tokenizer())
    found = pipeline("token-classification", model=str(tmp_path))(TEXTS)
    assert found == run("token-classification", sim.model)
    with pytest.raises(ValueError, match=r"holds a BertForTokenClassification with its quantizers, and no BertModel"):
        AutoModel.from_pretrained(tmp_path)
