"""A card's FP32 model, trained on in another form: what leaves is a bundle as small as the card's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from model_zoo.bundle import load_simulation
from model_zoo.cards import Card
from model_zoo.publish import write_bundle
from quantsim import QuantSim
from recipes.backends import SIMULATED
from recipes.base_model import base_model_folder, base_state
from recipes.bert_qat import description
from recipes.low_rank import low_rank_delta
from recipes.run import Run


def bundle_of(run: Run, card: Card, model: PreTrainedModel, sim: QuantSim, ptq: dict[str, Any], backend: str = SIMULATED) -> QuantSim:
    """Write ``bundle`` in the run's folder; what it holds, loaded again.

    Args:
        card: of the FP32 model that was trained on.
        model: that model (``Artifact.load_trainable``), as it was.
        sim: trained, with the same low-rank factors.
        ptq: what was measured before training.
        backend: what the trained model is measured on.
    """
    trained = {name: card.hyper_parameters[name] for name in ("method", "rank") if name in card.hyper_parameters}
    run.recipe = replace(run.recipe, base_model=card.base_model["name"], **trained)
    base = base_state(run.recipe.base_model, run.task.num_labels, span=run.task.span)
    metrics = {"ptq": ptq if backend == SIMULATED else {**ptq, "backend": backend}}

    def measure(what: str, model: nn.Module) -> None:
        metrics[what] = run.figures(run.evaluate(model, f"evaluate {what} of the bundle"))

    known = {**description(run), "metrics": metrics}
    deltas = low_rank_delta(model, base), low_rank_delta(sim.model, base)
    written = write_bundle(run.folder / "bundle", *deltas, sim, known, measure, backend)
    return load_simulation(written, lambda _: base_model_folder(run.recipe.base_model))
