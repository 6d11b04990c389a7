"""The zoo's program.

python -m model_zoo list            every config: where its checkpoint is, and what was measured
python -m model_zoo verify [NAME …] hash every bundled file again
python -m model_zoo publish DIR     put what recipes/bert_qat.py wrote into the zoo
python -m model_zoo results         write results.csv and the README's table from the cards
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from model_zoo import results
from model_zoo.cards import Card, find, names, verify
from model_zoo.format import BUNDLED, MEASURED
from quantsim import CheckpointError

HEADERS = ("name", "task", "base model", "where", "size", "FP32", "PTQ", "QAT")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 where a bundle is not what its card says or cannot be published."""
    parser = argparse.ArgumentParser(
        prog="python -m model_zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("list", help="every config and its figures")
    show.add_argument("--json", action="store_true", help="all that the cards say")
    check = commands.add_parser("verify", help="hash every bundled file again")
    check.add_argument("names", nargs="*", help="only these")
    put = commands.add_parser("publish", help="put a training run's bundle into the zoo")
    put.add_argument("folder", type=Path, help="the --output_dir of recipes/bert_qat.py; a sweep.json in it goes into the card")
    put.add_argument("--note", default="", help="a sentence for the card")
    commands.add_parser("results", help="write results.csv and the README's table from the cards")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "results":
            results.write()
            print(f"written: {results.CSV}, {results.README}")
            return 0
        if arguments.command == "verify":
            return _verify(arguments.names or names())
        if arguments.command == "publish":
            from model_zoo.publish import publish_run  # brings datasets and accelerate: seconds that the other commands don't need

            card = publish_run(arguments.folder, arguments.note)
            print(f"{listing([card])}\n\nwritten: {card.folder}")
            return 0
        cards = [find(name) for name in names()]
        print(json.dumps([card.to_dict() for card in cards], indent=1, ensure_ascii=False) if arguments.json else listing(cards))
        return 0
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def listing(cards: Sequence[Card]) -> str:
    """A line a config: task, base model, where it is, its size and the measured figures."""
    rows = [
        (card.name, card.task, card.base_model["name"], card.where, _size(card), *(_figures(card, what) for what in MEASURED))
        for card in cards
    ]
    return tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True)


def _size(card: Card) -> str:
    return f"{sum(record['size'] for record in card.files.values()) / 1e6:.1f} MB" if card.files else ""


def _figures(card: Card, name: str) -> str:
    figures = {key: value for key, value in card.metrics.get(name, {}).items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.2f}" for key, value in figures.items())


def _verify(chosen: Sequence[str]) -> int:
    broken = 0
    for name in chosen:
        try:
            card = find(name)
            if card.where == BUNDLED:
                verify(card)
        except CheckpointError as error:
            broken += 1
            print(f"{name}: BROKEN: {error}")
        else:
            print(f"{name}: {'every file is what its card says' if card.where == BUNDLED else f'not bundled ({card.where})'}")
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
