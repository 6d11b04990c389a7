"""Low-rank training: the encoder's weights become ``W + up @ down`` with ``W`` frozen, so a checkpoint is a few MB.

A computed weight is a short chain in the traced graph and its quantizer sits on the edge behind it, so quantization-aware
training of the factors needs nothing of its own (Hu et al., LoRA, 2021, without the extra scale; the sum is the weight).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from quantsim.formats.checkpoint import RANGES, plain_state
from recipes.tasks import RecipeError

Model = TypeVar("Model", bound=PreTrainedModel)

UP, DOWN = ".low_rank.up", ".low_rank.down"


class LowRank(nn.Module):
    """``W`` ``[out, in]`` → ``W + up @ down``, for ``torch.nn.utils.parametrize``.

    ``up`` ``[out, rank]`` starts at 0, so nothing changes at first; ``down`` ``[rank, in]`` is drawn from
    ``N(0, 1 / in)``.

    >>> weight = torch.randn(6, 4)
    >>> torch.equal(LowRank(6, 4, rank=2)(weight), weight)
    True
    """

    def __init__(self, out_features: int, in_features: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < rank <= min(out_features, in_features):
            raise RecipeError(
                f"LowRank: rank {rank}; a weight [{out_features}, {in_features}] has ranks 1 to {min(out_features, in_features)}"
            )
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, in_features, generator=generator) / in_features**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down  # [out, rank] @ [rank, in] -> [out, in]


def add_low_rank(model: PreTrainedModel, rank: int, seed: int = 0) -> None:
    """Train a model low-rank from now on, in place.

    The weights of the encoder's linears get a :class:`LowRank` and are frozen, embedding tables are frozen; the rest (biases,
    norms, pooler, head) is trained whole.

    Raises:
        RecipeError: the model repeats no layers that hold linears.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = list(encoder_linears(model))
    if not linears:
        raise RecipeError(f"{type(model).__name__}: no nn.Linear inside repeated layers (an nn.ModuleList); train it with method: full")
    for linear in linears:
        _attach(linear, LowRank(linear.out_features, linear.in_features, rank, generator))
    _freeze_tables(model)


@torch.no_grad()
def go_on_low_rank(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """As :func:`add_low_rank`, going on from the ``(up, down)`` of a checkpoint, by the weights' names."""
    for name, (up, down) in factors.items():
        linear = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(linear, nn.Linear):
            raise RecipeError(f"{name}: low-rank factors, but of no linear ({type(linear).__name__}), so train this checkpoint whole")
        low_rank = LowRank(linear.out_features, linear.in_features, up.shape[1], torch.Generator())
        low_rank.up.copy_(up)
        low_rank.down.copy_(down)
        _attach(linear, low_rank)
    _freeze_tables(model)


def _attach(linear: nn.Linear, low_rank: LowRank) -> None:
    parametrize.register_parametrization(linear, "weight", low_rank.to(linear.weight.device))
    linear.parametrizations["weight"].original.requires_grad_(False)  # type: ignore[index, union-attr]


def _freeze_tables(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def encoder_linears(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """Every ``nn.Linear`` inside the base model's repeated layers, once."""
    seen: set[nn.Module] = set()
    for layers in model.base_model.modules():
        if isinstance(layers, nn.ModuleList):
            for module in layers.modules():
                if isinstance(module, nn.Linear) and module not in seen:
                    seen.add(module)
                    yield module


def merged(model: Model) -> Model:
    """A new model of the same class and mode, whose computed weights are plain parameters with the same values.

    Not by ``parametrize.remove_parametrizations`` on a copy: copies share the class that it takes the weight from.
    """
    with torch.random.fork_rng(devices=[]):  # first values are replaced; the caller's random state stays
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(plain_state(model))
    plain.train(model.training)
    plain.to(device=model.device)  # type: ignore[call-arg]
    return plain


def low_rank_delta(model: nn.Module, base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds beside its base: factors as pairs, every other tensor that is not the base's as it is.

    Args:
        model: trained low-rank or whole; ``sim.model`` of a ``QuantSim`` as well (its ranges are left to the caller).
        base_state: the base's weights by the model's names (``recipes.base_model.base_state``).

    Raises:
        ValueError: a frozen weight under a :class:`LowRank` is not the base's.
    """
    delta: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, chain in getattr(module, "parametrizations", {}).items() if parametrize.is_parametrized(module) else ():
            key = f"{path}.{name}"
            if key not in base_state or not torch.equal(chain.original.detach().cpu(), base_state[key]):
                raise ValueError(f"{key}: the weight under its low-rank factors is not the base model's; was another base trained?")
            delta[key + UP], delta[key + DOWN] = chain[0].up, chain[0].down
    for key, x in model.state_dict().items():
        if ".parametrizations." in key or key.startswith(RANGES):
            continue
        if key not in base_state or not torch.equal(x.cpu(), base_state[key]):
            delta[key] = x
    return {key: x.detach().cpu().clone().contiguous() for key, x in delta.items()}
