"""AdamW, with its state in 32 or in 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from recipes.recipe import Training
from recipes.tasks import RecipeError


def optimizer_of(groups: list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    """The optimizer that ``settings.optimizer`` names, of parameter groups with their own ``lr`` and ``weight_decay``.

    ``adamw_8bit`` keeps both moments of a parameter of 4,096 values or more as 8-bit codes with a scale for each 256
    (Dettmers et al. 2021, arXiv 2110.02861; computed by bitsandbytes): 2 bytes a parameter in place of 8.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(f"optimizer: {settings.optimizer} needs bitsandbytes: pip install 'quantsim[lowbit]' ({error})") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.lr)
    return optimizer
