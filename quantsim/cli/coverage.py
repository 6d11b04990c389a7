"""``quantsim coverage``: every edge of a model, with its quantizer or the reason why it has none."""

from __future__ import annotations

import argparse
from typing import Any

from quantsim import QuantSim
from quantsim.cli.command import Answer, Command
from quantsim.cli.models import find_source, simulate
from quantsim.cli.quantize import config_arguments, config_of


def run(args: argparse.Namespace) -> Answer:
    config = config_of(args)
    source = find_source(args.model)
    sim = source.load_simulation() if source.load_simulation else simulate(source.name, source.load_float(), config)
    edges = _edges(sim)
    values = {
        "model": source.name,
        "architecture": type(sim.model).__name__,
        "config": sim.config.to_dict(),
        "quantizers": len(sim.quantizers),
        "unquantized_edges": sum(edge["quantizer"] is None for edge in edges),
        "edges": edges,
    }
    return Answer(str(sim), values)


def _edges(sim: QuantSim) -> list[dict[str, Any]]:
    """A row of the coverage table each; a range is that of the tensor, or from the least to the greatest of its channels."""
    quantizers = sim.quantizers
    edges = []
    for placement in sim.placements:
        quantizer = quantizers[placement.name] if placement.spec else None
        calibrated = quantizer is not None and quantizer.calibrated
        edges.append(
            {
                "edge": placement.name,
                "role": placement.role,
                "quantizer": None if placement.spec is None else str(placement.spec),
                "state": None if quantizer is None else quantizer.state.name.lower(),
                "range": [quantizer.min.min().item(), quantizer.max.max().item()] if quantizer and calibrated else None,
                "reason": placement.reason,
            }
        )
    return edges


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id of a transformers model, a checkpoint, or a card of the zoo")
    config_arguments(parser)


COVERAGE = Command(
    name="coverage",
    summary="Print every edge of a model with its quantizer, or the reason why it has none.",
    details="No data is needed. Of a checkpoint its own config and ranges are shown, and --preset and bits are not used.",
    examples=(
        "quantsim coverage google-bert/bert-base-uncased --preset bondarenko",
        "quantsim coverage bert-w8a8 --json",
    ),
    arguments=arguments,
    run=run,
)
