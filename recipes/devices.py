"""The device that a program was asked to run on."""

from __future__ import annotations

import torch

from recipes.tasks import RecipeError


def usable_device(name: str) -> torch.device:
    """A device by name, if tensors can be put there.

    Raises:
        RecipeError: they cannot.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device
