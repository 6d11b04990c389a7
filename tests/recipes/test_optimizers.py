"""The optimizer's state in 8 bits: small, near to 32 bits, and whole after a resume."""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.optimizers import optimizer_of
from recipes.tasks import RecipeError
from recipes.training import train
from tests.recipes.test_training import SETTINGS, Killed, job, kill_at, same, tiny

LOW_BIT = replace(SETTINGS, optimizer="adamw_8bit")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def widen(model: nn.Module) -> nn.Module:
    """With a matrix large enough for states in 8 bits (4,096 values)."""
    model.bert.embeddings.word_embeddings = nn.Embedding(512, 16, padding_idx=0)
    return model


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of its state."""
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RecipeError, match=r"adamw_8bit needs bitsandbytes: pip install 'quantsim\[lowbit\]'"):
        optimizer_of([{"params": list(nn.Linear(2, 2).parameters())}], LOW_BIT)


@pytest.mark.peer
@needs_bitsandbytes
def test_steps_are_near_those_in_32_bits_and_the_state_a_quarter() -> None:
    torch.manual_seed(0)
    first = nn.Linear(256, 256)
    x, target = torch.randn(64, 256), torch.randn(64, 256)
    losses, sizes = [], []
    for settings in (SETTINGS, LOW_BIT):
        model: Any = copy.deepcopy(first)
        optimizer = optimizer_of([{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.01}], settings)
        for _ in range(50):
            loss = (model(x) - target).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        sizes.append(moments(optimizer))
    start = (first(x) - target).square().mean().item()
    assert losses[0] < 0.7 * start
    assert abs(losses[1] - losses[0]) < 0.01 * start
    assert sizes[1] < 0.28 * sizes[0]


@pytest.mark.peer
@needs_bitsandbytes
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, killed, resumed = widen(tiny()), widen(tiny()), widen(tiny())
    for model in (killed, resumed):
        model.load_state_dict(whole.state_dict())
    train(job(whole, tmp_path / "whole", settings=LOW_BIT))
    with pytest.raises(Killed):
        train(job(killed, tmp_path / "killed", settings=LOW_BIT, save_steps=2, before_step=kill_at(7)))
    train(job(resumed, tmp_path / "killed", settings=LOW_BIT, save_steps=2))
    assert same(whole, resumed)
