"""What the processes of one training run exchange; ``recipes.batches.shares`` says which rows each of them has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from quantsim.quantizers.processes import world_size


def add_gradients(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Give every process the sum of all processes' gradients, and the sum of their losses: by one collective.

    Which parameters have a gradient must be the same on all of them.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not found:
        return loss
    flat = torch.cat([*(grad.reshape(-1) for grad in found), found[0].new_tensor([loss])])
    dist.all_reduce(flat)
    *sums, total = torch.split(flat, [*(grad.numel() for grad in found), 1])
    for grad, of_all in zip(found, sums, strict=True):
        grad.copy_(of_all.view_as(grad))
    return total.item()


@torch.no_grad()
def start_from_the_first(model: nn.Module) -> None:
    """Give every process the weights of the first: a machine of another kind may have drawn others from the same seed."""
    for x in model.state_dict().values():
        if world_size() > 1:
            dist.broadcast(x, src=0)
