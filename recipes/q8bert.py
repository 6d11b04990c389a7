"""Q8BERT (Zafrir et al., 2019): fine-tune with weights, embeddings and inputs of linears in 8 bits, then run on int8 kernels.

    python recipes/q8bert.py --task_name mrpc --model_type quant_bert --do_train --evaluate_during_training --output_dir runs/q8bert_mrpc
    python recipes/q8bert.py --task_name mrpc --model_type quant_bert --model_path runs/q8bert_mrpc --evaluate --load_quantized_model

Training leaves two models: in ``--output_dir`` FP32 weights with their ranges, to go on training with, and in ``int8`` under it integers
for inference alone. ``--mode`` says how the ranges of activations are found (ema, dynamic, none). ``--model_name_or_path`` is a base model,
a fine-tuned one, or a card of the zoo, whose model is trained low-rank as it was and leaves a bundle too. Every field of the recipe is a
flag too (``--finetune.clip 0.5``).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from model_zoo.cards import find, published
from model_zoo.publish import write_results
from quantsim import CalibrationError, CheckpointError, ConfigError, LoweringError, QuantConfig, QuantSim, State, TraceError
from quantsim.formats.checkpoint import plain_state, read_checkpoint
from quantsim.formats.description import tensors_sha256
from recipes.artifacts import from_card
from recipes.base_model import set_dropouts
from recipes.bert_qat import overrides, prepare, results, table
from recipes.evaluation import Evaluation
from recipes.glue_flags import add_glue_flags, glue_overrides
from recipes.model_folder import described, read_config, save_whole
from recipes.quantized_stages import calibrate
from recipes.reading import read_recipe
from recipes.recipe import Recipe
from recipes.run import Run, key_of
from recipes.stages import start
from recipes.tasks import RecipeError
from recipes.trained_on import bundle_of

RECIPES = Path(__file__).parent / "q8bert"
TASKS = sorted(path.stem for path in RECIPES.glob("*.yaml"))
INT8 = "int8"
PREDICTIONS = "predictions.txt"
Mode = Literal["ema", "dynamic", "none"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0, or 2 and a message where a user can set things right."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the only bars are the stages'
    try:
        recipe, args = parse(arguments)
        run = prepare(recipe, args, sample=True, tokenizer=tokenizer_of(args))
        if args.do_train:
            train(run)
        else:
            infer(run)
    except (RecipeError, CheckpointError, ConfigError, TraceError, CalibrationError, LoweringError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.metrics:
        run.say("\n" + table(run))
    return 0


# ---- train ----


def train(run: Run) -> None:
    """Train in 8 bits, and write and measure both models."""
    if run.processes.num_processes > 1:
        raise RecipeError("q8bert trains in one process: each would find ranges of its own (accelerate launch with one process)")
    settings = run.recipe.finetune
    model = starting_model(run)
    set_dropouts(model, settings.hidden_dropout, settings.attention_dropout)
    if begins_fine_tuned(run):
        run.measure("fp32", model)
        run.measure("calibrated", calibrated(run, model).model)
    before = tensors_sha256(plain_state(model))
    sim = QuantSim(model.to(run.args.device).train(False), q8bert(run.args.mode), in_place=True)
    rows = run.encoded(run.task, run.train_rows)
    if run.args.evaluate_during_training and run.args.eval_steps is None:
        run.args.eval_steps = math.ceil(len(rows) / settings.batch)  # once an epoch
    key = run.stage_key(key_of(before, run.recipe.seed, sim.config.to_dict()), "q8bert", settings, rows)
    run.stage("q8bert", key, sim.model, rows, settings)
    settle(run, sim)
    if begins_fine_tuned(run) and run.args.mode == "ema":
        card = find(run.args.model_name_or_path)
        sim = bundle_of(run, card, from_card(card, run.task).load_trainable(), sim, run.metrics["calibrated"])
    run.measure("q8bert", sim.model)
    int8 = sim.lower()
    run.measure(INT8, int8.model)
    save_whole(run.folder, partial(sim.save_pretrained, tokenizer=run.tokenizer, metrics=figures(run, "q8bert")))
    save_whole(run.folder / INT8, int8.save_pretrained, run.tokenizer.save_pretrained)
    write_results(run.folder, {**results(run), "mode": run.args.mode, "bytes": sizes(run.folder), "model": described(model)})
    run.say("\n".join(f"{name}: {size / 1e6:.1f} MB" for name, size in sizes(run.folder).items()))


def calibrated(run: Run, model: PreTrainedModel) -> QuantSim:
    """The same quantizers without training."""
    sim = QuantSim(copy.deepcopy(model).train(False), q8bert(run.args.mode), in_place=True)
    calibrate(run, sim)
    return sim


def q8bert(mode: Mode = "ema") -> QuantConfig:
    """The preset; with ``dynamic`` each activation has its own range, with ``none`` activations stay in floating point."""
    config = QuantConfig.preset("q8bert")
    assert config.activations is not None
    if mode == "none":
        return replace(config, activations=None, rules=tuple(rule for rule in config.rules if rule.role != "activation"))
    return replace(config, activations=replace(config.activations, follow=mode))


def starting_model(run: Run) -> PreTrainedModel:
    """A card's FP32 model, what an earlier run left to go on with, or a model of transformers, whose head is new where it has none."""
    name = run.args.model_name_or_path
    if name is None:
        return start(run.recipe, run.task, run.task.num_labels)
    if name in published():
        return from_card(find(name), run.task).load_trainable()
    if "quantization_config" in read_config(Path(name)):
        checkpoint = read_checkpoint(name)
        if checkpoint.integers():
            raise RecipeError(f"--model_name_or_path {name}: holds integers, for inference alone; go on training with {Path(name).parent}")
        return checkpoint.build()  # type: ignore[return-value]
    return start(replace(run.recipe, base_model=name), run.task, run.task.num_labels)


def settle(run: Run, sim: QuantSim) -> None:
    """Training that ended before some quantizers' ``start_step``: they get their range from calibration rows."""
    quantizers = sim.quantizers
    waiting = [name for name, quantizer in quantizers.items() if quantizer.state is State.WAITING]
    if not waiting:
        return
    run.say(f"trained for fewer steps than start_step; calibrated instead: {', '.join(waiting)}")
    kept = {q: (q.state, copy.deepcopy(q.range_tensors())) for name, q in quantizers.items() if name not in waiting}
    calibrate(run, sim)
    for quantizer, (state, tensors) in kept.items():
        quantizer.restore(state, tensors)


def begins_fine_tuned(run: Run) -> bool:
    """Training begins with a card's model, which is fine-tuned in FP32 already."""
    return run.args.model_name_or_path in published()


def figures(run: Run, what: str) -> dict[str, float]:
    return {name: value for name, value in run.metrics[what].items() if isinstance(value, float)}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of both models' weights."""
    return {"FP32": (folder / "model.safetensors").stat().st_size, INT8: (folder / INT8 / "model.safetensors").stat().st_size}


# ---- inference ----


def infer(run: Run) -> None:
    """Predict, and with ``--evaluate`` measure, what training left."""
    folder: Path = run.args.model_path
    model = load_int8(folder) if run.args.load_quantized_model else QuantSim.from_pretrained(folder).model
    result: Evaluation = run.evaluate(model, "int8" if run.args.load_quantized_model else "simulated")
    if run.args.evaluate:
        run.keep(INT8 if run.args.load_quantized_model else "q8bert", result)
    output: Path = run.args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    (output / PREDICTIONS).write_text("".join(f"{prediction}\n" for prediction in result.predictions), encoding="utf-8")
    run.say(f"{len(result.predictions)} predictions: {output / PREDICTIONS}")


def load_int8(folder: Path) -> nn.Module:
    """The int8 model on int8 kernels; ``train()`` on it is a ``LoweringError``."""
    return QuantSim.from_pretrained(folder / INT8).lower().model


# ---- command line ----


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe with its overrides, and the program's own flags."""
    paragraphs = __doc__.split("\n\n")
    parser = argparse.ArgumentParser("q8bert.py", description=paragraphs[0], epilog=paragraphs[2], allow_abbrev=False)
    parser.add_argument("--task_name", "--task", choices=TASKS, help="its recipe is recipes/q8bert/<task>.yaml")
    parser.add_argument("--recipe", type=Path, help="another recipe, in place of the task's")
    parser.add_argument("--model_type", choices=("quant_bert",), default="quant_bert")
    parser.add_argument("--mode", choices=get_args(Mode), default="ema", help="how the ranges of activations are found in training")
    parser.add_argument("--do_train", action="store_true")
    parser.add_argument("--evaluate_during_training", action="store_true", help="measure once an epoch, or every --eval_steps")
    parser.add_argument("--do_lower_case", action="store_true", help="taken and not needed: a tokenizer's files say so")
    parser.add_argument("--model_name_or_path", help="what training begins with; default the recipe's base model")
    parser.add_argument("--model_path", type=Path, help="for inference: the --output_dir of a training run")
    parser.add_argument("--output_dir", type=Path, help="default runs/<the recipe's name>, or --model_path")
    parser.add_argument("--evaluate", action="store_true", help="measure, beside predicting")
    parser.add_argument("--load_quantized_model", action="store_true", help="the int8 model, on int8 kernels")
    add_glue_flags(parser)
    args, rest = parser.parse_known_args(arguments)
    args.stage = "all"
    check(args)
    args.recipe = args.recipe or RECIPES / f"{args.task_name}.yaml"
    recipe = read_recipe(args.recipe, {**glue_overrides(args, "finetune"), **overrides(rest)})
    args.output_dir = args.output_dir or args.model_path or Path("runs") / recipe.name
    return recipe, args


def tokenizer_of(args: argparse.Namespace) -> str | None:
    """Where the tokenizer of the given model is; ``None``: it is that of the recipe's base model."""
    given = args.model_name_or_path if args.do_train else args.model_path
    if given is None or given in published():
        return None
    return str(given) if not Path(given).is_dir() or (Path(given) / "tokenizer_config.json").is_file() else None


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    if (args.task_name is None) == (args.recipe is None):
        raise RecipeError("give --task_name or --recipe, and not both")
    if args.do_train and (args.load_quantized_model or args.model_path):
        raise RecipeError("--do_train begins with --model_name_or_path; --model_path and --load_quantized_model are for inference alone")
    if not args.do_train and args.model_path is None:
        raise RecipeError("give --do_train, or --model_path with what training left")
    if args.load_quantized_model and not (args.model_path / INT8).is_dir():
        raise RecipeError(f"--load_quantized_model: {args.model_path} has no {INT8} folder; give the --output_dir of a training run")


if __name__ == "__main__":
    sys.exit(main())
