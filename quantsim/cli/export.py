"""``quantsim export``: a checkpoint → files of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from quantsim import QuantSim
from quantsim.cli.command import Answer, Command, CommandError, count, one_of
from quantsim.cli.models import find_source
from quantsim.cli.output import check_output, output_arguments, written_whole
from quantsim.formats.onnx.edges import Bias

FORMATS = ("onnx", "integers", "aimet")
BY_MODULE = "torch"
VERSIONS = (BY_MODULE, "0.6.1", "1.0.0", "2.0.0")
MODEL = ".onnx"


def run(args: argparse.Namespace) -> Answer:
    _check(args)
    source = find_source(args.checkpoint)
    sim = source.simulation()
    values = {"onnx": _onnx, "integers": _integers, "aimet": _aimet}[args.format](sim, args)
    lines = [f"written: {path}" for path in values["written"]]
    lines += [f"left out: {name}: {reason}" for name, reason in values.get("left_out", {}).items()]
    return Answer("\n".join(lines), {"checkpoint": source.name, "format": args.format, **values})


def _check(args: argparse.Namespace) -> None:
    """Refuse flags of the other format, and places that are taken."""
    of_qdq = ("bias", "opset", "single_operators")
    foreign = {"aimet": of_qdq, "onnx": ("encodings",), "integers": (*of_qdq, "encodings")}
    for name in foreign[args.format]:
        if (given := getattr(args, name)) is not None:
            flag = f"--{name.replace('_', '-')}" + ("" if given is True else f" {given}")
            raise CommandError(f"{flag}: means nothing with --format {args.format}; leave it out")
    check_output(args.output, args.overwrite, folder=False)
    if args.format == "aimet" and (args.encodings or BY_MODULE) != BY_MODULE:
        if args.output.suffix == MODEL:
            raise CommandError(
                f"--output {args.output}: is the encodings file, and the model goes beside it as *{MODEL}; name it otherwise"
            )
        check_output(args.output.with_suffix(MODEL), args.overwrite, folder=False)


def _onnx(sim: QuantSim, args: argparse.Namespace) -> dict[str, Any]:
    tensors = sim.export_onnx(args.output, args.bias or "float", args.opset, exact=not args.single_operators)
    return {"written": _files(args.output), "tensors": tensors}


def _integers(sim: QuantSim, args: argparse.Namespace) -> dict[str, Any]:
    sim.integer_only().export_onnx(args.output)
    return {"written": _files(args.output)}


def _files(output: Path) -> list[str]:
    """The model, and beside it the tensors of one that is too large for a file."""
    return [str(path) for path in (output, output.with_name(f"{output.name}.data")) if path.is_file()]


def _aimet(sim: QuantSim, args: argparse.Namespace) -> dict[str, Any]:
    version = args.encodings or BY_MODULE
    if version == BY_MODULE:
        left_out = sim.export_aimet_encodings(args.output, version)
        return {"written": [str(args.output)], "encodings": version, "left_out": left_out}
    model: Path = args.output.with_suffix(MODEL)
    with written_whole(model) as part, written_whole(args.output) as encodings:
        tensors = sim.export_onnx(part, quantize=False)
        left_out = sim.export_aimet_encodings(encodings, version, tensor_names=tensors)
    return {"written": [str(args.output), str(model)], "encodings": version, "tensors": tensors, "left_out": left_out}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder that `quantsim quantize` wrote, or a card of the zoo")
    parser.add_argument(
        "--format",
        required=True,
        type=one_of("format", FORMATS),
        metavar="NAME",
        help="onnx (QDQ), integers (ONNX without floats), aimet (encodings)",
    )
    output_arguments(parser, "the file to write")
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument(
        "--bias", type=one_of("bias", get_args(Bias)), metavar="NAME", help="float, or int32 as integer kernels add it (default float)"
    )
    onnx.add_argument("--opset", type=count, metavar="N", help="18 or more (default 20, or 21 where a type needs it)")
    onnx.add_argument(
        "--single-operators",
        action="store_true",
        default=None,
        help="softmax, norms and GELU as one operator each, for compilers that look for those; ONNX Runtime's logits are then near the "
        "simulation's, not the same",
    )
    aimet = parser.add_argument_group("aimet")
    aimet.add_argument(
        "--encodings",
        type=one_of("version of encodings", VERSIONS),
        metavar="VERSION",
        help=f"{BY_MODULE}, what aimet_torch loads (default); or {', '.join(VERSIONS[1:])}, by tensor of an FP32 ONNX model beside it",
    )


EXPORT = Command(
    name="export",
    summary="Write a checkpoint as an ONNX file, QDQ or of integers alone, or its ranges as AIMET encodings.",
    details=(
        "The ONNX file takes batches and lengths of any size and runs in ONNX Runtime and OpenVINO; that of integers is I-BERT's "
        "arithmetic, and wants a checkpoint whose products read 8 bits (preset ibert). It needs the extra quantsim[onnx], and so do "
        "encodings by tensor."
    ),
    examples=(
        "quantsim export bert-w8a8 --format onnx --output bert-qdq.onnx",
        "quantsim export bert-w8a8 --format aimet --output bert.encodings",
        "quantsim export bert_w8a8_rte --format aimet --encodings 2.0.0 --output rte.encodings",
    ),
    arguments=arguments,
    run=run,
)
