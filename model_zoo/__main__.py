"""``python -m model_zoo list`` and ``python -m model_zoo verify [name …]``: what is bundled, and is it what its cards say."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tabulate import tabulate

from model_zoo.cards import Card, find, published, verify
from quantsim import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 where a bundle is not what its card says."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every bundled checkpoint and its figures")
    check = commands.add_parser("verify", help="hash every file of every bundle again")
    check.add_argument("names", nargs="*", help="only these")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "list":
            print(listing([find(name) for name in published()]))
            return 0
        return _verify(arguments.names or published())
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def listing(cards: Sequence[Card]) -> str:
    """A line a checkpoint: task, base model, size and the measured figures."""
    if not cards:
        return "no checkpoints are bundled"
    rows = [
        (card.name, card.task, card.base_model["name"], _size(card), *(_figures(card, name) for name in ("fp32", "ptq", "qat")))
        for card in cards
    ]
    return tabulate(rows, headers=("name", "task", "base model", "size", "FP32", "PTQ", "QAT"), tablefmt="github", disable_numparse=True)


def _size(card: Card) -> str:
    return f"{sum(record['size'] for record in card.files.values()) / 1e6:.1f} MB"


def _figures(card: Card, name: str) -> str:
    figures = {key: value for key, value in card.metrics.get(name, {}).items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.2f}" for key, value in figures.items())


def _verify(names: Sequence[str]) -> int:
    broken = 0
    for name in names:
        try:
            verify(find(name))
        except CheckpointError as error:
            broken += 1
            print(f"{name}: BROKEN: {error}")
        else:
            print(f"{name}: every file is what its card says")
    if not names:
        print("no checkpoints are bundled")
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
