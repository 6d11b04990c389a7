"""Fine-tune a model with forward and backward in integers of 4 to 16 bits, and measure it.

    python recipes/integer_finetune.py --task rte --weight_bits 8 --activation_bits 8 --gradient_bits 8 --dataset FOLDER

Weights and their update stay in FP32 (arXiv 2209.09815). ``--float`` trains by the same recipe without integers, to compare with.
Every field of the recipe is a flag of its name (``--finetune.lr 5e-5``). A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_zoo.publish import write_results
from quantsim import ConfigError, FixedPointError, IntegerConfig, IntegerTraining, TraceError
from quantsim.rewrites.integer_training.config import KINDS, OPERANDS, Exponents, Rounding
from recipes.bert_qat import add_flags, overrides, prepare, results, table
from recipes.low_rank import merged
from recipes.reading import read_recipe
from recipes.recipe import Recipe
from recipes.run import Run
from recipes.stages import Rewrite, fine_tune
from recipes.tasks import RecipeError

RECIPES = Path(__file__).parent / "integer"
TASKS = sorted(path.stem for path in RECIPES.glob("*.yaml"))
MODEL = "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the only bars are the stages'
    try:
        recipe, config, args = parse(arguments)
        run = prepare(recipe, args)
        follow(run, config)
    except (RecipeError, ConfigError, TraceError, FixedPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.say("\n" + table(run))
    return 0


def follow(run: Run, config: IntegerConfig | None) -> None:
    """Train, measure (in integers, and the same weights in float), and write weights and results."""
    model, trained, _ = fine_tune(run, rewrite_of(config), fused=run.args.fused)
    if config is not None:
        run.measure(f"integers {config.weight_bits}-{config.activation_bits}-{config.gradient_bits}", trained)
    if config is None or run.args.measure_float:
        run.measure("float", model)
    if run.processes.is_main_process:
        write_model(run.folder / MODEL, merged(model))
        write_results(run.folder, {**results(run), "integer": config and asdict(config)})


def rewrite_of(config: IntegerConfig | None) -> Rewrite | None:
    """The model in integers; ``None`` trains it in float."""
    return None if config is None else Rewrite(asdict(config), lambda model: IntegerTraining(model, config).model)


def write_model(folder: Path, model: PreTrainedModel) -> None:
    """The FP32 weights, as ``transformers`` reads them; whole or not at all."""
    staging = folder.with_suffix(".saving")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


# ---- command line ----


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, IntegerConfig | None, argparse.Namespace]:
    """The recipe with its overrides, what is in integers, and the program's own flags."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("integer_finetune.py", description=lines[0], epilog=" ".join(lines[4:]), allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, help="its recipe is recipes/integer/<task>.yaml")
    parser.add_argument("--recipe", type=Path, help="another recipe, in place of the task's")
    parser.add_argument("--output_dir", type=Path, help="checkpoints, model and results.json; default runs/<the recipe's name>")
    add_integer_flags(parser)
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="don't compile elementwise kernels")
    add_flags(parser)
    args, rest = parser.parse_known_args(arguments)
    if (args.task is None) == (args.recipe is None):
        raise RecipeError("give --task or --recipe, and not both")
    args.stage = "all"
    recipe = read_recipe(args.recipe or RECIPES / f"{args.task}.yaml", overrides(rest))
    return recipe, None if args.float else integer_config(args), args


def add_integer_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of :class:`IntegerConfig`, and what is measured beside it."""
    default = IntegerConfig()
    parser.add_argument("--float", action="store_true", help="train in floating point, to compare with")
    for operand in OPERANDS:
        parser.add_argument(f"--{operand}_bits", type=int, default=8, help="4 to 16; default 8")
        parser.add_argument(f"--{operand}_rounding", choices=get_args(Rounding), default=default.rounding(operand))
    parser.add_argument(
        "--exponents", choices=get_args(Exponents), default=default.exponents, help="one a row, or one a tensor as published"
    )
    parser.add_argument("--ops", nargs="+", choices=KINDS, default=default.ops, help="what is computed in integers; default all but matmul")
    parser.add_argument("--keep_float", nargs="+", default=(), metavar="PATTERN", help="names of ops to leave in float")
    parser.add_argument(
        "--no-measure-float", dest="measure_float", action="store_false", help="measure what was trained in integers there alone"
    )


def integer_config(args: argparse.Namespace) -> IntegerConfig:
    values: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(IntegerConfig)}
    return IntegerConfig(**values)


if __name__ == "__main__":
    sys.exit(main())
