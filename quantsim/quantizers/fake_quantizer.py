"""The fake quantizer: a range, the state it is in, and ``fake_quantize`` on what passes through."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, fake_quantize, scale_gradient, straight_through
from quantsim.numerics.fused import fused_fake_quantize, fused_kernels_active
from quantsim.quantizers.range_estimators import RangeEstimator, range_estimator

MASK_FLOOR = -1e4


class CalibrationError(RuntimeError):
    """Calibration met values that no sensible range can hold; the message names the quantizer and the range."""


class State(Enum):
    """What a quantizer does with the tensor that passes through.

    ``OFF``, ``ESTIMATING`` and ``WAITING`` pass it on unchanged; ``FIXED``, ``LEARNING`` and ``FOLLOWING`` quantize it. In
    ``LEARNING`` the range is trained; in ``FOLLOWING`` it follows the values, for which ``WAITING`` waits
    (``quantsim.quantizers.following``).
    """

    OFF = 0
    ESTIMATING = 1
    FIXED = 2
    LEARNING = 3
    WAITING = 4
    FOLLOWING = 5


class FakeQuantizer(nn.Module):
    """Quantizes one edge of a graph.

    ``min`` and ``max`` (``[]``, with an axis ``[channels]`` or ``[groups]``) are parameters, trained in ``State.LEARNING`` and
    without gradient in every other state. ``group_of`` ``[channels]`` says which group's range a channel has. The state is kept
    in the ``state_dict``, so that a loaded quantizer does what the saved one did.

    Args:
        spec: bits, symmetry, axis, estimator.
        name: the placement's name, for messages.
        channels: the axis's size, where the spec has one: the number of ranges, if they are not in groups.

    Attributes:
        overwrites: nobody else reads the tensor that comes in, so without gradients its memory is used for the result.
        lsq_gradients: a learned range's gradient is divided by ``sqrt(N * quant_max)``, with ``N`` the elements of a row (of a
            weight: all) that share it (Esser et al., LSQ, 2020, section 2.2). Off, as in the reference code of range learning.
    """

    overwrites = False
    lsq_gradients = False
    min: nn.Parameter
    max: nn.Parameter
    group_of: Tensor | None
    state_code: Tensor

    def __init__(self, spec: QuantSpec, name: str = "", channels: int | None = None) -> None:
        super().__init__()
        if (spec.axis is None) != (channels is None):
            raise ValueError(
                f"{name or 'FakeQuantizer'}: axis {spec.axis} needs {'no' if spec.axis is None else 'a'} channel count, got {channels}"
            )
        self.spec = spec
        self.name = name
        shape = () if channels is None else (spec.groups or channels,)
        self.min = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.max = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.register_buffer("group_of", None if channels is None or spec.groups is None else equal_groups(channels, spec.groups))
        self.register_buffer("state_code", torch.tensor(State.OFF.value, dtype=torch.uint8))
        self._state = State.OFF
        self._estimator: RangeEstimator | None = None
        self._frozen: tuple[object, AffineParams] | None = None

    # ---- state ----

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self.state_code.fill_(state.value)
        learning = state is State.LEARNING
        self.min.requires_grad_(learning)
        self.max.requires_grad_(learning)
        if state is State.ESTIMATING and self._estimator is None:
            self._estimator = range_estimator(self.spec)

    @property
    def calibrated(self) -> bool:
        return self._state in (State.FIXED, State.LEARNING, State.FOLLOWING)

    def finish_estimating(self) -> None:
        """Take the estimator's range and start quantizing, learning where the spec says so.

        Raises:
            CalibrationError: nothing was observed, or what was observed is not finite.
        """
        estimator, self._estimator = self._estimator, None
        try:
            if estimator is None:
                raise RuntimeError("calibration was not started")
            low, high = estimator.range()
        except RuntimeError as error:
            self.state = State.OFF
            raise CalibrationError(f"{self.name}: {error}") from error
        self.state = State.OFF
        self.check_range(low, high)
        self.set_range(*self._grouped(low, high))

    def check_range(self, low: Tensor, high: Tensor) -> None:
        """Refuse a calibrated range that no grid can hold, with :class:`CalibrationError`."""
        if not (high - low).isfinite().all():
            raise CalibrationError(
                f"{self.name}: calibrated to [{low.min().item():.4g}, {high.max().item():.4g}]; expected ends and width to be finite. "
                "Check the model's weights and the batches for NaN and infinity"
            )

    @property
    def estimator(self) -> RangeEstimator:
        """What turns observed values into a range; the state must be ``ESTIMATING``."""
        assert self._estimator is not None, f"{self.name}: observes in state ESTIMATING, not {self._state.name}"
        return self._estimator

    def observe(self, x: Tensor) -> None:
        """Show the estimator a tensor."""
        self.estimator.observe(x.detach())

    def _grouped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ranges of the groups, ``[C] -> [G]``: each holds those of its channels."""
        if self.group_of is None:
            return low, high
        low, high = low.to(self.group_of.device), high.to(self.group_of.device)
        if self.spec.group_by == "range":
            rank = (high - low).argsort(stable=True).argsort()  # [C], of each channel by its width
            self.group_of.copy_(equal_groups(len(low), len(self.min)).to(rank.device)[rank])
        lowest = low.new_full(self.min.shape, torch.inf).scatter_reduce(0, self.group_of, low, "amin")
        highest = high.new_full(self.max.shape, -torch.inf).scatter_reduce(0, self.group_of, high, "amax")
        return lowest, highest

    def range_tensors(self) -> dict[str, Tensor]:
        """All that its range is made of, by name, detached: what a checkpoint holds, and what :meth:`restore` takes back."""
        tensors = {"min": self.min.detach(), "max": self.max.detach()}
        return tensors if self.group_of is None else tensors | {"group_of": self.group_of}

    def restore(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state and the :meth:`range_tensors` that were kept aside; an estimation under way is forgotten."""
        self._estimator = None
        for name, own in self.range_tensors().items():
            own.copy_(tensors[name])
        self.state = state

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Use this range from now on: fixed, or learning where the spec says so."""
        with torch.no_grad():
            self.min.copy_(low.expand_as(self.min))
            self.max.copy_(high.expand_as(self.max))
        self.state = State.FOLLOWING if self.spec.follow != "no" else State.LEARNING if self.spec.learn else State.FIXED

    # ---- the range in use ----

    def affine_params(self) -> AffineParams:
        """Scale and zero point of the present range; computed again only when the range has changed."""
        if self._state is State.LEARNING and torch.is_grad_enabled():
            return self._affine(self.min, self.max)
        if torch.compiler.is_compiling():
            return self._affine(self.min.detach(), self.max.detach())
        key = tuple(fingerprint(x) for x in self.range_tensors().values())
        if self._frozen is None or self._frozen[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference could not be trained with later
                self._frozen = (key, self._affine(self.min.detach(), self.max.detach()))
        return self._frozen[1]

    def _affine(self, low: Tensor, high: Tensor) -> AffineParams:
        """``[]``, ``[C]``, or ``[G] -> [C]``: a channel has its group's scale and zero point, the group the sum of their gradients."""
        if self.group_of is not None:
            low, high = low[self.group_of], high[self.group_of]
        return affine_params(low, high, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        if self._state in (State.OFF, State.WAITING):
            return x
        if self._state is State.ESTIMATING:
            self.observe(x)
            return x
        params = self._lsq_params(x) if self.lsq_gradients else self.affine_params()
        if self.spec.straight_through and torch.is_grad_enabled() and x.requires_grad:
            return straight_through(x, fake_quantize(x.detach(), params))
        if fused_kernels_active() and torch.is_grad_enabled() and (x.requires_grad or params.scale.requires_grad):
            return fused_fake_quantize(x, params)
        return fake_quantize(x, params, self.overwrites and not isinstance(x, nn.Parameter))

    def _lsq_params(self, x: Tensor) -> AffineParams:
        """:meth:`affine_params` with LSQ's gradient scale."""
        factor = (self._sharing(x) // self.min.numel() * self.spec.quant_max) ** -0.5
        return self._affine(scale_gradient(self.min, factor), scale_gradient(self.max, factor))

    def _sharing(self, x: Tensor) -> int:
        """The elements that LSQ counts: of one row, whatever the batch."""
        return x[0].numel()

    # ---- nn.Module's plumbing ----

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.state = State(int(self.state_code.item()))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frozen": None}  # a copy works out its own

    def extra_repr(self) -> str:
        return f"{self.spec}, {self._state.name.lower()}"


class WeightQuantizer(FakeQuantizer):
    """A fake quantizer that quantizes a frozen parameter once, not at every forward.

    The quantized copy is used while parameter and range keep their :func:`fingerprint` and no gradient is asked for.
    A computed weight (``torch.nn.utils.parametrize``) is not a parameter and is quantized each time.
    """

    _quantized: tuple[object, Tensor] | None = None

    def _sharing(self, x: Tensor) -> int:
        return x.numel()

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and (x.requires_grad or self.min.requires_grad)
        if not self.calibrated or training or not isinstance(x, nn.Parameter) or torch.compiler.is_compiling():
            self._quantized = None
            return super().forward(x)
        key = (fingerprint(x), fingerprint(self.min), fingerprint(self.max))
        if self._quantized is None or self._quantized[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._quantized = (key, super().forward(x).detach())
        return self._quantized[1]

    def train(self, mode: bool = True) -> WeightQuantizer:
        self._quantized = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_quantized": None}


class MaskedScoreQuantizer(FakeQuantizer):
    """The quantizer of a mask's sum: it refuses to spread its grid over a mask that was never clamped."""

    def check_range(self, low: Tensor, high: Tensor) -> None:
        if low.min().item() < MASK_FLOOR:
            raise CalibrationError(
                f"{self.name}: the sum of scores and attention mask calibrated down to {low.min().item():.4g}, below {MASK_FLOOR:g}: "
                "a grid over that range would round every score to 0. Set QuantConfig.mask_clamp (-6 by default), or leave "
                "this edge unquantized with Rule(op='mask_add', role='activation', enabled=False)"
            )
        super().check_range(low, high)


def equal_groups(channels: int, groups: int) -> Tensor:
    """``[channels]``: the group of each, in order; sizes differ by one at most.

    >>> equal_groups(7, 3)
    tensor([0, 0, 0, 1, 1, 2, 2])
    """
    return torch.arange(channels) * groups // channels


def fingerprint(x: Tensor) -> tuple[object, ...]:
    """A key that changes when ``x`` does, for the price of reading it once.

    Its storage and version counter, which every write that autograd can see moves, and the sum of its values, for writes
    through ``.data``, which autograd cannot see (one that is lost in the rounding of a float32 sum goes unnoticed).
    """
    if x.numel() == 1:
        return x.dtype, x.device, x.item()
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.detach().sum().item()
