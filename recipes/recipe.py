"""A recipe: everything that decides what a training run gives. ``recipes.reading`` makes one from YAML and flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quantsim.config import EstimatorName, PostTraining, QuantConfig, QuantSpec
from quantsim.sim import resolve_config
from recipes.tasks import RecipeError


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the training loop.

    Attributes:
        lr: peak learning rate; for low-rank training that of the factors.
        whole_lr: peak learning rate of what low-rank training trains whole (norms, biases, pooler, head); ``None`` is ``lr``.
        epochs: passes over the rows; half a pass is 0.5.
        batch: rows an optimizer step sees, over all devices and accumulated batches.
        accumulate: forward passes an optimizer step takes; must divide ``batch``.
        warmup_ratio: part of all steps in which the rate rises to its peak.
        schedule: what it does then, by ``transformers``' name.
        weight_decay: on matrices alone; norms, biases and ranges have none.
        hidden_dropout, attention_dropout: the model's dropouts in this run.
        clip: largest norm of the gradient of the weights (ranges are not clipped).
        mixed_precision: ``bf16`` autocast where the device has kernels for it (:meth:`Recipe.in_float32` where not), or ``no``.
        optimizer: ``adamw``, or ``adamw_8bit`` with its moments in 8 bits (``recipes.optimizers``).
        average: decay of a moving average of the weights (ranges apart), which the run ends with (``recipes.averages``); 0 is none.
    """

    lr: float
    whole_lr: float | None = None
    epochs: float
    batch: int
    accumulate: int = 1
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: float = 0.01
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    clip: float = 1.0
    mixed_precision: Literal["bf16", "no"] = "bf16"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    average: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "lr", "epochs", "batch", "accumulate", "clip", *(["whole_lr"] if self.whole_lr is not None else []))
        _parts(self, "warmup_ratio", "hidden_dropout", "attention_dropout", "average")
        if self.batch % self.accumulate:
            raise RecipeError(f"accumulate: {self.accumulate}; expected a divisor of batch, which is {self.batch}")


@dataclass(frozen=True, kw_only=True)
class Intermediate(Training):
    """Training on another task before.

    Attributes:
        task, split: what to train on.
        label_map: its label → ours (MNLI's neutral and contradiction → RTE's not_entailment); ``None`` keeps labels. With
            another number of labels than the task's the head is drawn anew afterwards.
        real_or_fake: in place of the task itself learn to tell its texts from broken copies (``recipes.real_or_fake``); the
            labels are then CoLA's.
    """

    task: str
    split: str = "train"
    label_map: Mapping[int, int] | None = None
    real_or_fake: bool = False


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """``(1 - weight) * loss + weight * temperature² * KL(teacher / temperature ‖ student / temperature)``.

    The teacher of QAT is the FP32 model that the quantized one was made from, that of fine-tuning a :class:`Teacher`; its logits
    are computed once, before training. For regression the second term is the squared difference of the logits, for spans the
    mean over start and end.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _parts(self, "weight")
        _positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A larger model that is trained on the task first, and then teaches the recipe's own (``recipes.teacher``).

    Attributes:
        base_model: a Hub id or a folder; it is trained whole, and read with its own tokenizer.
        finetune: how it is trained.
        distillation: how much of its logits the recipe's model learns from.
        edited_copies: copies of each training row, each with another small edit, that the teacher alone says the answer to.
    """

    base_model: str
    finetune: Training
    distillation: Distillation = field(default_factory=lambda: Distillation(weight=0.9))
    edited_copies: int = 0

    def __post_init__(self) -> None:
        if self.edited_copies < 0:
            raise RecipeError(f"edited_copies: {self.edited_copies}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Qat(Training):
    """Quantization-aware training of weights and ranges.

    Attributes:
        range_lr: peak learning rate of the ranges.
        range_gradient: ``lsq`` divides a range's gradient by ``sqrt(N * quant_max)`` for ``N`` elements sharing it (LSQ, 2020).
            Adam divides it by its own size anyway, so expect little of it.
        delay: part of the steps, at the start, that are trained unquantized; then the ranges are calibrated again.
        freeze_ranges_last: part of the steps, at the end, in which ranges are fixed.
        distillation: learn from the FP32 model too.
        fused: run the fake quantizers as compiled kernels (needs a C++ compiler; without one they run eagerly, with a warning).
    """

    range_lr: float = 1e-3
    range_gradient: Literal["plain", "lsq"] = "plain"
    delay: float = 0.0
    weight_decay: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    mixed_precision: Literal["bf16", "no"] = "no"
    freeze_ranges_last: float = 0.0
    distillation: Distillation | None = None
    fused: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _parts(self, "freeze_ranges_last", "delay")
        _positive(self, "range_lr")
        if self.delay + self.freeze_ranges_last > 1:
            raise RecipeError(f"delay: {self.delay} and freeze_ranges_last: {self.freeze_ranges_last} leave no step to learn ranges in")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``rows`` training rows, drawn by the recipe's seed, in batches of ``batch``; how values become ranges (``None``: the preset's)."""

    rows: int = 64
    batch: int = 16
    estimator: EstimatorName | None = "min_max"
    weight_estimator: EstimatorName | None = "min_max"

    def __post_init__(self) -> None:
        _positive(self, "rows", "batch")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the simulation is made with.

    Attributes:
        preset: a preset's name or a JSON file of a :class:`QuantConfig`.
        weight_bits, activation_bits: in place of the preset's; embeddings and norms count as weights.
        calibration: how ranges are found.
        post_training: what calibration does to weights too, before QAT: smoothing, AdaRound, bias correction.
        compare_estimators: range estimators of the activations whose PTQ figures are measured too, and written beside.
    """

    preset: str = "aimet"
    weight_bits: int | None = None
    activation_bits: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    post_training: PostTraining = field(default_factory=PostTraining)
    compare_estimators: tuple[EstimatorName, ...] = ()

    def config(self, estimator: EstimatorName | None = None) -> QuantConfig:
        """The preset with the recipe's bits and estimators, or with another estimator of the activations."""
        config, ranges = resolve_config(self.preset), self.calibration

        def changed(spec: QuantSpec | None, bits: int | None, estimator: EstimatorName | None) -> QuantSpec | None:
            return spec and replace(spec, bits=bits or spec.bits, estimator=estimator or spec.estimator)

        return replace(
            config,
            weights=changed(config.weights, self.weight_bits, ranges.weight_estimator),
            activations=changed(config.activations, self.activation_bits, estimator or ranges.estimator),
            post_training=self.post_training or config.post_training,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """From a base model to a quantized classifier.

    Attributes:
        name: of the bundle that comes out.
        base_model: a Hub id or a folder.
        task: a name of ``recipes.tasks``.
        dataset: a Hub id, or a folder in the Hub's layout; the task's own on the Hub by default.
        train_split: the split that is trained on.
        max_length: tokens a pair is cut to; quantized models are trained and evaluated padded to it.
        seed: of heads, factors, order of rows, dropout and calibration rows.
        method: ``low_rank`` (``W + up @ down`` of ``rank``) or ``full``.
        intermediate: tasks trained before, in order.
        teacher: what fine-tuning learns from beside the labels; ``None`` is nothing.
    """

    name: str
    base_model: str
    task: str
    dataset: str | None = None
    train_split: str = "train"
    max_length: int = 128
    seed: int = 1000
    method: Literal["low_rank", "full"] = "low_rank"
    rank: int = 16
    intermediate: tuple[Intermediate, ...] = ()
    teacher: Teacher | None = None
    finetune: Training
    quantization: Quantization = field(default_factory=Quantization)
    qat: Qat

    def __post_init__(self) -> None:
        _positive(self, "max_length", "rank")

    def in_float32(self) -> Recipe:
        """This recipe with ``mixed_precision: no`` in every stage."""
        return replace(
            self,
            intermediate=tuple(replace(before, mixed_precision="no") for before in self.intermediate),
            teacher=self.teacher and replace(self.teacher, finetune=replace(self.teacher.finetune, mixed_precision="no")),
            finetune=replace(self.finetune, mixed_precision="no"),
            qat=replace(self.qat, mixed_precision="no"),
        )


def _positive(value: Any, *names: str) -> None:
    for name in names:
        if not getattr(value, name) > 0:
            raise RecipeError(f"{name}: {getattr(value, name)!r}; expected a number above 0")


def _parts(value: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(value, name) <= 1:
            raise RecipeError(f"{name}: {getattr(value, name)!r}; expected a number from 0 to 1")
