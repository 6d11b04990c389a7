"""Integer-only BERT in I-BERT's three stages (Kim et al., 2021), for any encoder.

    python recipes/ibert_finetune.py --task mrpc --stage full-precision --output_dir runs/ibert_mrpc
    python recipes/ibert_finetune.py --task mrpc --stage quantize --output_dir runs/ibert_mrpc
    python recipes/ibert_finetune.py --task mrpc --stage integer --output_dir runs/ibert_mrpc

``--output_dir`` is one model's folder. Stage ``quantize`` calibrates it, writes ``quant_mode: true`` in its config.json, and keeps the
FP32 model and its optimizer, scheduler and trainer state aside in ``full-precision``; it also begins with any fine-tuned model
(``--model_name_or_path``: a folder, a Hub id, or a card of the zoo, ``bert_w8a8_mrpc``). Stage ``integer`` trains what ``integer_only``
computes and keeps what it began with aside in ``quantized``; given a card (``--model_name_or_path bert_w8a8_mrpc``) it calibrates the
card's FP32 model, trains it low-rank as that was trained, and leaves a bundle for the zoo too. Integer models are evaluated as integers.
Flags are those of run_glue.py; every field of the recipe is a flag too (``--qat.range_lr 1e-4``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_zoo.cards import Card, find, published
from model_zoo.publish import RESULTS, write_results
from quantsim import CalibrationError, CheckpointError, ConfigError, IntegerError, QuantSim, TraceError
from quantsim.formats.checkpoint import WEIGHTS, file_sha256, is_checkpoint, read_checkpoint
from quantsim.rewrites.integer_only import ForceDequant
from recipes.artifacts import from_card
from recipes.backends import INTEGERS, on_integers
from recipes.bert_qat import overrides, prepare, results, table
from recipes.glue_flags import add_glue_flags, glue_overrides
from recipes.hub import hub_reachable
from recipes.low_rank import merged
from recipes.model_folder import MODEL, TRAINER_STATE, described, read_config, read_json, save_whole, set_aside
from recipes.quantized_stages import quantize, train_quantized
from recipes.reading import read_recipe
from recipes.recipe import Recipe
from recipes.run import Run, key_of
from recipes.stages import fine_tune
from recipes.tasks import RecipeError
from recipes.trained_on import bundle_of

RECIPES = Path(__file__).parent / "ibert"
TASKS = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FULL_PRECISION, QUANTIZE, INTEGER = "full-precision", "quantize", "integer"
QUANTIZED = "quantized"  # where stage 3 keeps what stage 2 gave


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the only bars are the stages'
    try:
        recipe, args = parse(arguments)
        start = start_of(args)
        run = prepare(recipe, args, sample=True, tokenizer=tokenizer_of(start))
        model = STAGES[args.stage](run, start)
        write_results(run.folder, {**results(run), "model": described(model)})
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError, IntegerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.say(f"\n{table(run)}\n\nmodel: {run.folder}")
    return 0


# ---- stages ----


def full_precision(run: Run, start: str | None) -> PreTrainedModel:
    """Stage 1: fine-tune the base model."""
    model, _, _ = fine_tune(run)
    whole = merged(model)
    save_whole(run.folder, whole.save_pretrained, run.tokenizer.save_pretrained)
    run.measure("fp32", whole)
    return whole


def quantize_only(run: Run, start: str | None) -> PreTrainedModel:
    """Stage 2: calibrate, and say so in config.json."""
    assert start is not None
    model = load_float(run, start)
    run.measure("fp32", model)
    sim = quantize(run, model)
    sim.model.config.quant_mode = True  # type: ignore[union-attr]
    run.measure("quantized", sim.integer_only(run.args.force_dequant).model)
    if Path(start).resolve() == run.folder.resolve():
        run.say(f"kept aside in {run.folder / FULL_PRECISION}: {', '.join(set_aside(run.folder, MODEL + TRAINER_STATE, FULL_PRECISION))}")
    save(run, sim)
    return model


def integer(run: Run, start: str | None) -> PreTrainedModel:
    """Stage 3: train the integers."""
    assert start is not None
    if start in published():
        return integer_from_card(run, find(start))
    folder = Path(start)
    sim = QuantSim.from_pretrained(folder)
    teacher = read_checkpoint(folder).build()
    assert isinstance(teacher, PreTrainedModel)  # it was built from a class name of transformers
    run.metrics |= read_json(folder / RESULTS).get("metrics", {})
    with sim.integer_only_training(run.args.force_dequant):
        train_quantized(run, sim, teacher, key_of("integer-only", run.args.force_dequant, file_sha256(folder / WEIGHTS)))
    measure_integers(run, sim)
    if folder.resolve() == run.folder.resolve():
        set_aside(run.folder, MODEL, QUANTIZED)
    save(run, sim)
    return teacher


def integer_from_card(run: Run, card: Card) -> PreTrainedModel:
    """Stages 2 and 3 on a card's FP32 model: a bundle holds what differs from the base, in the card's rank."""
    model = from_card(card, run.task).load_trainable()
    run.measure("fp32", model)
    sim = quantize(run, model)
    sim.model.config.quant_mode = True  # type: ignore[union-attr]
    run.measure("quantized", on_integers(sim))
    with sim.integer_only_training():
        train_quantized(run, sim, model, key_of("integer-only", card.files))
    sim = bundle_of(run, card, model, sim, run.metrics["quantized"], INTEGERS)
    measure_integers(run, sim)
    save(run, sim)
    return model


def measure_integers(run: Run, sim: QuantSim) -> None:
    """The integer graph on all rows, against the training form."""
    with sim.integer_only_training(run.args.force_dequant):
        trained_form = run.evaluate(sim.model, "evaluate the training form")
    integers = run.evaluate(sim.integer_only(run.args.force_dequant).model, "evaluate integers")
    equal = int((np.asarray(trained_form.logits) == integers.logits).all(axis=1).sum())
    run.keep("integer", integers)
    run.metrics["integer"] |= {"equal_to_training_form": equal}
    run.say(f"rows whose logits are those of the training form, bit for bit: {equal} of {integers.rows}")


STAGES = {FULL_PRECISION: full_precision, QUANTIZE: quantize_only, INTEGER: integer}


def save(run: Run, sim: QuantSim) -> None:
    metrics = {name: value for name, value in list(run.metrics.values())[-1].items() if isinstance(value, float)}
    save_whole(run.folder, partial(sim.save_pretrained, tokenizer=run.tokenizer, metrics=metrics))


def load_float(run: Run, start: str) -> PreTrainedModel:
    """A fine-tuned classifier in FP32."""
    if start in published():
        return from_card(find(start), run.task).load_float()
    if not Path(start).is_dir():
        hub_reachable()  # decides within seconds, where transformers would try for minutes
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(start)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--model_name_or_path {start}: cannot be read ({error})") from error
    if model.config.num_labels != run.task.num_labels:
        raise RecipeError(f"{start}: has {model.config.num_labels} labels; {run.task.name} has {run.task.num_labels}")
    return model.eval()  # type: ignore[no-any-return]


# ---- where a stage begins ----


def start_of(args: argparse.Namespace) -> str | None:
    """What the stage begins with: ``--model_name_or_path``, or what the stage before left in ``--output_dir``.

    Raises:
        RecipeError: there is nothing, or it is of another stage.
    """
    folder, named = args.output_dir, args.model_name_or_path
    here = read_config(folder)
    is_quantized = "quantization_config" in here
    if args.stage == FULL_PRECISION:
        if is_quantized:
            raise RecipeError(f"{folder}: holds a quantized model; give another --output_dir to fine-tune a new one")
        return None
    if args.stage == QUANTIZE:
        if (folder / QUANTIZED).is_dir():
            raise RecipeError(f"{folder}: holds a model that stage integer trained; give another --output_dir to quantize anew")
        if named is not None and Path(named).is_dir() and is_checkpoint(Path(named)):
            raise RecipeError(f"{named}: is quantized; stage quantize begins with a model in FP32")
        aside = folder / FULL_PRECISION
        found = named or (str(aside) if read_config(aside) else None) or (str(folder) if here and not is_quantized else None)
        if found is None:
            raise RecipeError(
                f"{folder}: holds no fine-tuned model. Run --stage full-precision first, or give one with --model_name_or_path: a folder, "
                f"a Hub id, or a card of the zoo ({', '.join(published())})"
            )
        return found
    if named in published():
        if args.force_dequant != "none":
            raise RecipeError(f"--force_dequant {args.force_dequant}: a card's model is trained on integers alone; leave it out")
        return str(named)
    start = Path(named) if named else folder / QUANTIZED if read_config(folder / QUANTIZED) else folder
    if not read_config(start).get("quant_mode") or not is_checkpoint(start):
        raise RecipeError(f"{start}: holds no quantized model (quant_mode: true in config.json); run --stage quantize first")
    return str(start)


def tokenizer_of(start: str | None) -> str | None:
    """Where the tokenizer of what the stage begins with is; ``None``: it is that of the recipe's base model."""
    if start is None or start in published():
        return None
    if not Path(start).is_dir():
        return start
    folders = (Path(start), Path(start).parent)  # of a model that was kept aside it stayed where it was
    return next((str(folder) for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


# ---- command line ----


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe with its overrides, and the program's own flags."""
    paragraphs = __doc__.split("\n\n")
    parser = argparse.ArgumentParser("ibert_finetune.py", description=paragraphs[0], epilog=paragraphs[2], allow_abbrev=False)
    parser.add_argument("--task", "--task_name", choices=TASKS, help="its recipe is recipes/ibert/<task>.yaml")
    parser.add_argument("--recipe", type=Path, help="another recipe, in place of the task's")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--output_dir", type=Path, help="the model's folder; default runs/<the recipe's name>")
    parser.add_argument("--model_name_or_path", help="what the stage begins with, where not with what the stage before left")
    parser.add_argument("--force_dequant", choices=get_args(ForceDequant), default="none", help="functions to compute in floating point")
    add_glue_flags(parser)
    args, rest = parser.parse_known_args(arguments)
    if (args.task is None) == (args.recipe is None):
        raise RecipeError("give --task or --recipe, and not both")
    trained = "finetune" if args.stage == FULL_PRECISION else "qat"
    changes = {**glue_overrides(args, trained), **overrides(rest)}
    if args.stage == FULL_PRECISION and args.model_name_or_path is not None:
        changes["base_model"] = args.model_name_or_path
    args.recipe = args.recipe or RECIPES / f"{args.task}.yaml"
    recipe = read_recipe(args.recipe, changes)
    args.output_dir = args.output_dir or Path("runs") / recipe.name
    return recipe, args


if __name__ == "__main__":
    sys.exit(main())
