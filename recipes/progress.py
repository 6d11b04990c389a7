"""The bar of a training run: steps, loss and metric of the last batches, and what the last evaluation gave."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from recipes.metrics import score
from recipes.tasks import Task

LAST = 50


class Progress:
    """A progress bar, as a context manager.

    The metric is the task's headline over the last 50 forward passes, as the model was when it saw them; for spans the percent
    of rows whose first and last token are both right.
    """

    def __init__(self, task: Task, title: str, total: int, done: int, shown: bool) -> None:
        self.task = task
        self.bar = tqdm(total=total, initial=done, desc=title, mininterval=1.0, disable=not shown)
        self.losses: deque[float] = deque(maxlen=LAST)
        self.seen: deque[tuple[Any, Any]] = deque(maxlen=LAST)
        self.eval: dict[str, str] = {}
        self.epoch = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self.bar.close()

    def saw(self, loss: float, logits: Tensor, answers: Tensor) -> None:
        """Take a forward pass into account: logits ``[rows, classes]`` or ``[rows, tokens, 2]``, answers ``[rows]`` or ``[rows, 2]``."""
        self.losses.append(loss)
        if not self.bar.disable:
            found = logits.detach().squeeze(-1) if self.task.regression else logits.detach().argmax(dim=1)
            self.seen.append((found.float().cpu().numpy(), answers.float().cpu().numpy()))

    def stepped(self, epoch: int) -> None:
        """One step further."""
        self.epoch = epoch
        if self.bar.update():  # true where the bar is due to be drawn
            self._show()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self.eval = {f"eval {self.task.metric}": f"{metrics[self.task.metric]:.2f}"}

    def _show(self) -> None:
        if self.seen:
            self.bar.set_postfix({"epoch": self.epoch, "loss": f"{np.mean(self.losses):.4f}", **self._metric(), **self.eval})

    def _metric(self) -> dict[str, str]:
        found, answers = (np.concatenate(values) for values in zip(*self.seen, strict=True))
        if self.task.span:
            return {"exact": f"{100 * (found == answers).all(axis=1).mean():.1f}"}
        return {self.task.metric: f"{score(self.task, found, answers)[self.task.metric]:.1f}"}
