"""Small batches made from a model's config, and other shapes of a batch that is at hand."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

ROWS, CHOICES, LENGTH = 2, 3, 12
MASK = "attention_mask"

Batch = Mapping[str, Tensor]


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A random batch that fits ``model.config``: ids ``[2, 12]`` (``[2, 3, 12]`` for multiple choice) or pixels.

    With ids come the masks, segments and boxes on a page that the model takes.

    Raises:
        ValueError: the model has no ``config``, or takes none of the inputs that are known here.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config to make example inputs from; pass example_inputs")
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    batch: dict[str, Tensor] = {}
    if "input_ids" in takes:
        positions = getattr(config, "max_position_embeddings", None) or -1
        shape = [ROWS, min(LENGTH, positions - 2) if positions > 0 else LENGTH]  # -1: as many as one likes
        if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
            shape.insert(1, CHOICES)
        batch["input_ids"] = torch.randint(3, config.vocab_size, shape, generator=generator)
        if MASK in takes:
            batch[MASK] = torch.ones(shape, dtype=torch.long)
            batch[MASK][-1, ..., -2:] = 0
        if "token_type_ids" in takes:
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
            batch["token_type_ids"][..., shape[-1] // 2 :] = getattr(config, "type_vocab_size", 1) > 1
        if "bbox" in takes:
            batch["bbox"] = _boxes(shape, getattr(config, "max_2d_position_embeddings", 1024), generator)
    elif "pixel_values" in takes:
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        batch["pixel_values"] = torch.randn(ROWS, config.num_channels, *size, generator=generator)
    else:
        raise ValueError(f"{type(model).__name__}.forward takes neither input_ids nor pixel_values; pass example_inputs")
    return {name: value.to(device) for name, value in batch.items()}


def _boxes(shape: list[int], sizes: int, generator: torch.Generator) -> Tensor:
    """Boxes on a page, ``x0 <= x1`` and ``y0 <= y1`` below ``sizes``: ``[*shape, 4]``."""
    corners = torch.randint(0, sizes, [*shape, 2, 2], generator=generator).sort(dim=-2).values
    return corners.flatten(-2)  # [..., 2, 2] -> [..., (x0, y0, x1, y1)]


def without_axes_of_one(batch: Batch) -> dict[str, Tensor]:
    """The batch repeated where an axis of ids or masks (``[rows, length]``, ``[rows, choices, length]``) has size 1."""
    batch = at_least_two_rows(batch)
    ids = {name: x for name, x in batch.items() if not x.is_floating_point() and x.ndim in (2, 3)}
    return batch | {name: x.repeat([2 if size == 1 else 1 for size in x.shape]) for name, x in ids.items()}


def at_least_two_rows(batch: Batch) -> dict[str, Tensor]:
    """The batch repeated along its first axis where it has one row: an axis of size 1 would be traced as fixed."""
    return {name: x.repeat(2, *[1] * (x.ndim - 1)) if x.ndim and x.shape[0] == 1 else x for name, x in batch.items()}


def other_shape(batch: Batch) -> dict[str, Tensor]:
    """The same inputs with one row more and, for ids and masks, a sequence that is shorter by one; the last token is masked."""
    other = {}
    ids = batch.get("input_ids")
    for name, x in batch.items():
        x = torch.cat([x, x[:1]])
        axis = x.ndim - 1
        if ids is not None and x.ndim > ids.ndim and x.shape[ids.ndim - 1] == ids.shape[-1]:
            axis = ids.ndim - 1  # boxes: four numbers a token
        if not x.is_floating_point() and x.ndim >= 2 and x.shape[axis] > 2:
            x = x.narrow(axis, 0, x.shape[axis] - 1).clone()
        if name == MASK:
            x[0, ..., -1] = 0
        other[name] = x
    return other
