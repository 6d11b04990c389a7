"""``quantsim report``: one HTML page about a quantized model."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantsim import QuantSim
from quantsim.cli.command import Answer, Command, CommandError
from quantsim.cli.data import batches, check_vocabulary, data_arguments, row_length, takes_text
from quantsim.cli.models import find_source
from quantsim.cli.output import check_output
from quantsim.cli.quantize import calibrated, calibration_arguments, calibration_data, config_arguments, config_of
from quantsim.report.analysis import is_analysis

RESULTS = ".json"


def run(args: argparse.Namespace) -> Answer:
    results = args.output.with_suffix(RESULTS)
    kept = is_analysis(results)  # a page with its results beside it is gone on with
    check_output(args.output, args.overwrite or kept, folder=False)
    if results.exists() and not kept:
        raise CommandError(f"--output {args.output}: its results would replace {results}, which is no analysis; give another path")
    config = config_of(args)
    source = find_source(args.model)
    data = calibration_data(args)
    tokenizer = source.usual_tokenizer(args.tokenizer)
    if source.load_simulation is not None:
        sim = source.simulation()
        takes_text(source.name, sim.model)
        check_vocabulary(source.name, tokenizer, sim.model)  # type: ignore[arg-type]  # of a class of transformers
        length = row_length(args, source.max_length, sim.model.config, tokenizer)  # type: ignore[arg-type]
    else:
        sim, length = calibrated(source, config, data, tokenizer, args)
    page = sim.report(
        list(batches(data, tokenizer, length, args.batch)),
        args.output,
        before=_before(args.before, sim),
        sensitivity=not args.no_sensitivity,
        rows=None,
        title=args.title or source.name,
    )
    values = {"written": [str(page), str(results)], "model": source.name, "rows": len(data.rows), "max_length": length}
    return Answer(f"written: {page}\nresults: {results}", values)


def _before(text: str | None, sim: QuantSim) -> QuantSim | Path | None:
    """What is shown beside it: the results of an earlier report, or another checkpoint."""
    if text is None:
        return None
    if Path(text).suffix == RESULTS:
        return Path(text)
    other = find_source(text).simulation()
    if type(other.model) is not type(sim.model):
        raise CommandError(f"--before {text}: is a {type(other.model).__name__}, and the model a {type(sim.model).__name__}")
    return other


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint or a card of the zoo; or a transformers model, which is calibrated first"
    )
    parser.add_argument("--output", "-o", type=Path, default=Path("report.html"), metavar="PATH", help="the page (default report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that has no results beside it")
    parser.add_argument("--before", metavar="WHAT", help="to show beside it: another checkpoint, or the .json of an earlier report")
    parser.add_argument(
        "--no-sensitivity", action="store_true", help="leave out what each quantizer costs alone, which is most of the work"
    )
    parser.add_argument("--title", help="of the page (default: MODEL)")
    data_arguments(parser, rows="train, or the only one", default_rows=64)
    config_arguments(parser)
    calibration_arguments(parser)
    parser.set_defaults(device="cpu")


REPORT = Command(
    name="report",
    summary="Write one HTML page: coverage, ranges, histograms, SQNR, outliers, sensitivity.",
    details=(
        "The page needs no network. What was measured is kept beside it as JSON while it is measured: after an interruption the same "
        "command goes on from there. A checkpoint keeps its config and ranges; preset, bits and estimators are for a model that is not "
        "quantized yet. It needs the extra quantsim[report]."
    ),
    examples=(
        "quantsim report bert-w8a8 --data sentences.txt --output report.html",
        "quantsim report bert_w8a8_rte --task rte --before rte-ptq --rows 32 --output rte.html",
        "quantsim report ./my-model --data sentences.txt --preset bondarenko --no-sensitivity",
    ),
    arguments=arguments,
    run=run,
)
