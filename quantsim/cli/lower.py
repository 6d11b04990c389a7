"""``quantsim lower``: a checkpoint → an int8 checkpoint."""

from __future__ import annotations

import argparse

from quantsim.cli.command import Answer, Command
from quantsim.cli.models import find_source
from quantsim.cli.output import check_output, output_arguments, written_whole
from quantsim.report.lowering import lowered_edges


def run(args: argparse.Namespace) -> Answer:
    check_output(args.output, args.overwrite, folder=True)
    source = find_source(args.checkpoint)
    lowered = source.simulation().lower()
    tokenizer = source.usual_tokenizer(args.tokenizer)
    with written_whole(args.output) as folder:
        lowered.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    values = {
        "output": str(args.output),
        "checkpoint": source.name,
        "bytes_in_memory": lowered.bytes,
        "bytes_on_disk": size,
        "fallback": lowered.fallback,
        "edges": [edge._asdict() for edge in lowered_edges(lowered.graph)],
    }
    return Answer(f"{lowered}\n\nwritten: {args.output} ({size / 1e6:.1f} MB)", values)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder that `quantsim quantize` wrote, or a card of the zoo")
    output_arguments(parser, "the int8 checkpoint's folder")
    parser.add_argument("--tokenizer", metavar="PLACE", help="a folder or Hub id, where the checkpoint has no tokenizer")


LOWER = Command(
    name="lower",
    summary="Write a checkpoint whose weights are int8, a quarter of the FP32 model's size.",
    details=(
        "Prints which kernel computes each edge on this machine. The weights are on their grid: QuantSim.from_pretrained reads the "
        "checkpoint, and sim.lower() runs it on integers."
    ),
    examples=("quantsim lower bert-w8a8 --output bert-int8", "quantsim lower bert_w8a8_rte --output rte-int8 --json"),
    arguments=arguments,
    run=run,
)
