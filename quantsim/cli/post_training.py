"""The arguments of post-training methods: what calibration does beside finding a range for each edge."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from quantsim import PostTraining, QuantConfig, QuantSim, Rule
from quantsim.cli.command import CommandError, count
from quantsim.graph.roles import RESIDUAL

SEARCH_BITS = 16


def post_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`with_post_training` and :func:`search_config` take."""
    group = parser.add_argument_group(
        "post-training", "for models that are not trained afterwards; docs/post_training.md has what each gains"
    )
    add = group.add_argument
    add("--smooth", type=part, metavar="ALPHA", help="scale outlier channels into weights, 0 to 1; 0.5 does for most models")
    add("--bias-correction", action="store_true", help="add the mean error of each layer to its bias")
    add("--adaround", type=count, metavar="STEPS", help="learn which weights to round up, in so many steps a layer; try 300")
    add("--residual-groups", type=count, metavar="K", help="K ranges along the channels of each residual sum and norm; try 6")
    add("--residual-bits", type=count, metavar="N", help="bits of residual sums and norms, in place of --activation-bits")
    add(
        "--search-edges",
        type=count,
        metavar="N",
        help=f"{SEARCH_BITS} bits for the N activations that gain most by it, searched on the first batch",
    )


def part(text: str) -> float:
    """An argument's type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 0 to 1")
    return value


def with_post_training(config: QuantConfig, args: argparse.Namespace) -> QuantConfig:
    """The config with what was asked for; what it has itself stays where nothing was.

    Raises:
        ConfigError: bits that no grid has.
    """
    asked = {f.name: value for f in fields(PostTraining) if (value := getattr(args, f.name)) is not None and value is not False}
    changes: dict[str, Any] = {}
    if args.residual_groups is not None:
        changes |= {"axis": -1, "groups": args.residual_groups}
    if args.residual_bits is not None:
        changes |= {"bits": args.residual_bits}
    rules = (Rule(op=RESIDUAL, role="activation", set=changes),) if changes else ()
    return replace(config, post_training=replace(config.post_training, **asked)).with_rules(*rules)


def search_config(sim: QuantSim, batches: Iterable[Any], edges: int) -> QuantConfig:
    """The simulation's config with :data:`SEARCH_BITS` for so many activations, found on the first of the batches.

    Raises:
        CommandError: no activation gains by more bits.
    """
    config = sim.search_bits(list(islice(batches, 1)), edges=edges, bits=SEARCH_BITS)
    if config == sim.config:
        raise CommandError("--search-edges: no activation gains by more bits; leave it out")
    return config
