"""``quantsim quantize``: a model and some rows → a calibrated checkpoint."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, get_args

from torch import nn

from quantsim import QuantConfig, QuantSim
from quantsim.cli.command import Answer, Command, CommandError, count, one_of, progress
from quantsim.cli.data import TRAINING, Data, batches, check_vocabulary, data_arguments, drawn, find_data, row_length, takes_text
from quantsim.cli.models import Source, find_source, simulate
from quantsim.cli.output import check_output, output_arguments, written_whole
from quantsim.cli.post_training import SEARCH_BITS, post_training_arguments, search_config, with_post_training
from quantsim.config import EstimatorName
from quantsim.report.coverage import summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ESTIMATORS = get_args(EstimatorName)


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is quantized, and how."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--preset", default="aimet", metavar="NAME|FILE", help="a preset, or a JSON file of ours or AIMET's (default aimet)")
    group.add_argument("--weight-bits", type=count, metavar="N", help="2 to 16, in place of the preset's")
    group.add_argument("--activation-bits", type=count, metavar="N", help="2 to 16, in place of the preset's")


def calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how values become ranges."""
    group = parser.add_argument_group("calibration")
    estimator = one_of("estimator", ESTIMATORS)
    names = ", ".join(ESTIMATORS)
    group.add_argument("--estimator", type=estimator, metavar="NAME", help=f"of activations: {names} (default: the preset's)")
    group.add_argument("--weight-estimator", type=estimator, metavar="NAME", help="of weights (default: the preset's)")
    group.add_argument("--seed", type=int, default=1000, metavar="N", help="draws the rows (default 1000, the recipes')")


def config_of(args: argparse.Namespace) -> QuantConfig:
    """The preset with the bits and estimators that were asked for.

    Raises:
        ConfigError: no such preset, a file that is no config, or bits that no grid has.
    """
    from recipes.recipe import Calibration, Quantization

    calibration = Calibration(estimator=getattr(args, "estimator", None), weight_estimator=getattr(args, "weight_estimator", None))
    return Quantization(
        preset=args.preset, weight_bits=args.weight_bits, activation_bits=args.activation_bits, calibration=calibration
    ).config()


def calibration_data(args: argparse.Namespace) -> Data:
    """The rows to calibrate with, drawn by the seed."""
    from recipes.tasks import find_task

    task = find_task(args.task) if args.task else None
    data = find_data(args, task, TRAINING)
    return Data(drawn(data.rows, args.rows, args.seed), data.columns, data.source)


def calibrated(
    source: Source, config: QuantConfig, data: Data, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[QuantSim, int]:
    """The simulation of a source's model with its ranges, and the length that rows were padded to."""
    model = source.load_float()
    nn.Module.to(model, args.device)
    takes_text(source.name, model)
    check_vocabulary(source.name, tokenizer, model)
    length = row_length(args, source.max_length, model.config, tokenizer)
    sim = simulate(source.name, model, config)
    sim.compute_encodings(progress(batches(data, tokenizer, length, args.batch), "calibrate", -(-len(data.rows) // args.batch)))
    return sim, length


def run(args: argparse.Namespace) -> Answer:
    check_output(args.output, args.overwrite, folder=True)
    config = with_post_training(config_of(args), args)
    from recipes.devices import usable_device

    device = usable_device(args.device)
    source = find_source(args.model)
    if source.load_simulation is not None and not source.is_card:
        raise CommandError(f"{source.name}: is quantized already; give the model that it was made from")
    data = calibration_data(args)
    tokenizer = source.usual_tokenizer(args.tokenizer)
    began = time.perf_counter()
    sim, length = calibrated(source, config, data, tokenizer, args)
    if args.search_edges is not None:
        found = search_config(sim, batches(data, tokenizer, length, args.batch), args.search_edges)
        sim, _ = calibrated(source, found, data, tokenizer, args)
    seconds = time.perf_counter() - began
    with written_whole(args.output) as folder:
        sim.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    counts = summary(sim.placements)
    wide = [str(rule.module) for rule in sim.config.rules[len(config.rules) :]]  # what a search added
    text = (
        f"{type(sim.model).__name__}, {config.name}: {counts}\n"
        f"calibrated on {len(data.rows)} rows of {data.source} ({', '.join(data.columns)}), padded to {length} tokens, "
        f"{args.estimator}, {seconds:.1f} s on {device}\n"
        + "".join(f"{SEARCH_BITS} bits: {name}\n" for name in wide)
        + f"written: {args.output}"
    )
    calibration = {
        "data": asdict(data.source),
        "columns": list(data.columns),
        "rows": len(data.rows),
        "max_length": length,
        "estimator": args.estimator,
        "weight_estimator": args.weight_estimator,
        "seed": args.seed,
    }
    values = {
        "output": str(args.output),
        "model": source.name,
        "architecture": type(sim.model).__name__,
        "config": sim.config.to_dict(),
        "searched_edges": wide,
        "quantizers": len(sim.quantizers),
        "unquantized_edges": sum(placement.spec is None for placement in sim.placements),
        "calibration": calibration,
        "seconds": round(seconds, 3),
    }
    return Answer(text, values)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id of a transformers model, or a card of the zoo (its FP32 model)")
    output_arguments(parser, "the checkpoint's folder")
    data_arguments(parser, rows="train, or the only one", default_rows=64)
    config_arguments(parser)
    calibration_arguments(parser)
    post_training_arguments(parser)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps … (default cpu)")


QUANTIZE = Command(
    name="quantize",
    summary="Calibrate a model on some rows and write a quantized checkpoint.",
    details=(
        "The model's class is the one that its config.json names. Labels are not needed. The checkpoint holds weights, ranges and the "
        "tokenizer; QuantSim.from_pretrained reads it, and its ranges can be trained further."
    ),
    examples=(
        "quantsim quantize google-bert/bert-base-uncased --data sentences.txt --output bert-w8a8",
        "quantsim quantize ./my-model --data pairs.csv --columns premise hypothesis --rows 128 --estimator percentile --output out",
        "quantsim quantize bert_w8a8_rte --task rte --preset deploy --output rte-deploy",
        "quantsim quantize ./my-model --data nyu-mll/glue --task mrpc --weight-bits 4 --estimator mse --output out",
        "quantsim quantize ./my-model --data sentences.txt --smooth 0.5 --bias-correction --output out",
    ),
    arguments=arguments,
    run=run,
)
