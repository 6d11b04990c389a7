"""Learning from a teacher: its logits of every row, and a larger model that is trained on the task to be one."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantsim.quantizers.processes import on_every_process
from recipes.base_model import base_model_folder, base_weights_sha256, load_base, set_dropouts
from recipes.losses import TEACHER, logits_of
from recipes.real_or_fake import broken
from recipes.recipe import Teacher, Training
from recipes.run import Encoded, Run, key_of
from recipes.tasks import RecipeError, Task


def taught_rows(run: Run, settings: Teacher) -> Encoded:
    """The recipe's training rows and edited copies of them, with the logits of a teacher that was trained on the former.

    A copy's label is what the teacher says: an edit may change the answer.
    """
    if run.task.kind != "classification":
        raise RecipeError(f"teacher: {run.task.name} is a {run.task.kind} task; expected one of classification")
    finetune, seed = settings.finetune, run.recipe.seed
    try:
        teacher, tokenizer = load_base(settings.base_model, run.task.num_labels, seed=seed)
    except RecipeError as error:
        raise RecipeError(f"teacher.{error}. To train without a teacher: --teacher null") from error
    set_dropouts(teacher, finetune.hidden_dropout, finetune.attention_dropout)
    rows = run.encoded(run.task, run.train_rows, tokenizer=tokenizer)
    key = run.stage_key(key_of("", seed, base_weights_sha256(base_model_folder(settings.base_model))), "teacher", finetune, rows)
    run.stage("teacher", key, teacher, rows, finetune, tokenizer=tokenizer)
    copies = edited(run.train_rows, run.task, settings.edited_copies, seed)
    folder = run.stage_folder("taught", key_of(key, settings.edited_copies))
    logits = teach(run, teacher, rows + run.encoded(run.task, copies, tokenizer=tokenizer), finetune, folder, tokenizer)
    found = run.encoded(run.task, run.train_rows) + run.encoded(run.task, copies)
    for i, (row, said) in enumerate(zip(found, logits.tolist(), strict=True)):
        row[TEACHER] = said
        if i >= len(rows):
            row["labels"] = int(logits[i].argmax())
    return found


def edited(rows: Dataset, task: Task, copies: int, seed: int) -> Dataset:
    """``copies`` of each row in turn, each with one small edit to one of its texts (``recipes.real_or_fake.broken``).

    Labels are those of the rows. A text of one word stays as it is.
    """
    chance = random.Random(seed)
    texts = {name: list(rows[name]) * copies for name in task.columns}
    for i in range(len(rows) * copies):
        name = chance.choice(task.columns)
        if len(words := texts[name][i].split()) > 1:
            texts[name][i] = " ".join(broken(words, chance))
    return Dataset.from_dict({**texts, task.label: list(rows[task.label]) * copies})


@torch.no_grad()
def teach(
    run: Run, teacher: PreTrainedModel, rows: Encoded, settings: Training, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """The teacher's logits of every row, ``[rows, classes]`` or ``[rows, tokens, 2]``: once a stage, and kept in its folder.

    Args:
        settings: the stage's, for ``batch`` and ``mixed_precision``.
        tokenizer: the one that rows were read with; by default the base model's.
    """
    path = folder / f"{TEACHER}.safetensors"
    processes = run.processes
    if all(on_every_process(path.is_file, RecipeError)):
        return load_file(path)[TEACHER]
    teacher.to(run.args.device).eval()
    collate = run.collator(padded=False, tokenizer=tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = torch.device(run.args.device)

    def share() -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        starts = range(0, len(order), settings.batch)[processes.process_index :: processes.num_processes]
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
            for k in tqdm(starts, desc="teacher", disable=not processes.is_main_process):
                part = order[k : k + settings.batch]
                batch = {name: x.to(device) for name, x in collate([rows[i] for i in part]).items()}
                found |= dict(zip(part, logits_of(teacher, batch).float().cpu(), strict=True))
        return found

    found = {i: logits for part in on_every_process(share, RecipeError) for i, logits in part.items()}
    logits = torch.stack([found[i] for i in range(len(rows))])
    if processes.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".saving")
        save_file({TEACHER: logits}, staging)
        staging.replace(path)
    return logits
