"""The device that a program was asked to run on, and what it can do."""

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


def multiplies_bf16(name: str) -> bool:
    """Whether a device has kernels for products in bfloat16; a CPU below AVX-512 has none, and takes longer than in float32.

    On such a CPU (AVX2, two cores) a product of 1024 x 768 with 768 x 3072 takes 6.6 times as long as in float32, and the
    backward pass far more.
    """
    return torch.device(name).type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
