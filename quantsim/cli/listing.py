"""``quantsim list``: presets, estimators, tasks, backends, and the zoo's cards."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from quantsim import QuantConfig, QuantSpec
from quantsim.cli.command import Answer, Command
from quantsim.cli.models import card_names
from quantsim.config import EstimatorName

ESTIMATORS: dict[EstimatorName, str] = {
    "min_max": "the smallest and the largest value",
    "running_min_max": "a moving average of each batch's extremes",
    "percentile": "all but the outermost 0.01 %",
    "mse": "the least squared error of rounding and clipping",
    "sqnr": "the same, with clipping counted three times",
}
MEASURED = ("fp32", "ptq", "qat")


def run(args: argparse.Namespace) -> Answer:
    from recipes.backends import BACKENDS
    from recipes.tasks import TASKS

    presets = {name: QuantConfig.preset(name) for name in QuantConfig.presets()}
    cards = [_card(name) for name in card_names()]
    tables: dict[str, Iterable[tuple[str, ...]]] = {
        "presets": [(name, *_specs(config)) for name, config in presets.items()],
        "estimators": list(ESTIMATORS.items()),
        "tasks": [(name, ", ".join(task.columns), ", ".join(task.metrics)) for name, task in TASKS.items()],
        "backends": [(name,) for name in BACKENDS],
        "cards of the zoo": [_line(card) for card in cards],
    }
    text = "\n\n".join(f"{title}\n{tabulate(list(rows), tablefmt='plain', disable_numparse=True)}" for title, rows in tables.items())
    values = {
        "presets": {name: config.to_dict() for name, config in presets.items()},
        "estimators": ESTIMATORS,
        "tasks": {name: {"columns": list(task.columns), "metrics": list(task.metrics)} for name, task in TASKS.items()},
        "backends": list(BACKENDS),
        "cards": cards,
    }
    return Answer(text, values)


def _specs(config: QuantConfig) -> tuple[str, str, str]:
    def said(what: str, spec: QuantSpec | None) -> str:
        return f"{what} {spec}" if spec else f"{what} in floating point"

    mask = "mask as it is" if config.mask_clamp is None else f"mask at {config.mask_clamp:g}"
    before = f", only what {' and '.join(config.activations_before)} reads" if config.activations_before else ""
    return said("weights", config.weights), said("activations", config.activations) + before, mask


def _card(name: str) -> dict[str, Any]:
    from model_zoo.cards import find

    card = find(name)
    metrics = {what: dict(card.metrics[what]) for what in MEASURED if what in card.metrics}
    return {"name": card.name, "task": card.task, "base_model": card.base_model["name"], "where": card.where, "metrics": metrics}


def _line(card: dict[str, Any]) -> tuple[str, ...]:
    figures = []
    for what, found in card["metrics"].items():
        metric, value = next((name, value) for name, value in found.items() if isinstance(value, float))
        figures.append(f"{what.upper()} {metric} {value:.2f}")
    return (card["name"], card["base_model"], card["where"], *figures)


def arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


LIST = Command(
    name="list",
    summary="List presets, estimators, tasks, backends, and the zoo's cards with their figures.",
    details="A card's name stands for MODEL or CHECKPOINT in every other command.",
    examples=("quantsim list", "quantsim list --json"),
    arguments=arguments,
    run=run,
)
