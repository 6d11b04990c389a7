"""Dynamic fixed point: a tensor becomes integers that share one exponent, and comes back.

With ``b`` bits, and ``E`` the largest exponent in the tensor (``2**(E-1) <= max|x| < 2**E``)::

    exponent = max(E - b + 1, -126)
    mantissa = clamp(round(x * 2**-exponent), -limit, limit),   limit = 2**(b-1) - 1
    x_hat    = mantissa * 2**exponent

``step = 2**exponent`` is at most ``max|x| * 2**(2-b)``. Rounding is stochastic (up with the probability of the fraction, so that
the mean is ``x``) or to the nearest::

    |x_hat - x| < step      stochastic;      mean square step² / 6 where fractions are spread evenly
    |x_hat - x| <= step/2   nearest;         mean square step² / 12

but for the last step below ``2**E``: what would round up to ``2**E`` is clamped to ``limit * step``, by less than a step.
So a bit more is 6.02 dB, and stochastic rounding costs 3.01 dB.

**Exponents of rows.** One exponent for a whole tensor leaves few steps to what lies beside an outlier. So the rows of a matrix (or its
columns) may have an exponent each, found in the row as above; a matrix may be multiplied by powers of two along its other axis before
(``times``), which is exact as long as it stays a normal float32: so a factor of a product can take over the exponents of the other. All
of the bounds hold row by row.

A tensor of zeros, or an empty one, has the least exponent. The least step is the smallest normal float32: what is smaller, denormals
among it, is rounded on that grid. A tensor with NaN or infinity has no exponent and is refused.

Source: Tayaranian et al., arXiv 2209.09815, section 3; integers are scaled by powers of two alone, so every scaling is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantsim.numerics.fused import compiled_kernel, fused_kernels_active
from quantsim.numerics.random_bits import RANDOM_BITS, random_bits

LEAST_BITS, MOST_BITS = 4, 16
LEAST_EXPONENT = -126

CHUNK = 1 << 17  # elements


class FixedPointError(ValueError):
    """A tensor that has no fixed-point form: the message names it."""


@dataclass(frozen=True)
class FixedPoint:
    """``mantissa * 2**exponent``: int8 up to 8 bits, int16 up to 16.

    ``exponent`` is one for all, or int32 ``[n, 1]`` of the rows or ``[1, m]`` of the columns.
    """

    mantissa: Tensor
    exponent: int | Tensor
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def step(self) -> float | Tensor:
        return math.ldexp(1.0, self.exponent) if isinstance(self.exponent, int) else power_of_two(self.exponent)

    def t(self) -> FixedPoint:
        """The last two axes swapped: ``[*, n, k] -> [*, k, n]``."""
        return replace(self, mantissa=self.mantissa.mT, exponent=self.exponent if isinstance(self.exponent, int) else self.exponent.mT)

    def without_exponent(self) -> FixedPoint:
        """The mantissas alone, for a product whose other factor took the exponents over (``times``)."""
        return replace(self, exponent=0)

    def value(self) -> Tensor:
        """``x_hat``, as float32; exact."""
        return self.mantissa.float() * self.step


def check_bits(bits: int, what: str = "bits") -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not LEAST_BITS <= bits <= MOST_BITS:
        raise FixedPointError(f"{what}: {bits!r}; expected an integer from {LEAST_BITS} to {MOST_BITS}")


def limit_of(bits: int) -> int:
    """The largest mantissa.

    >>> limit_of(8)
    127
    """
    return int(2 ** (bits - 1) - 1)


def shared_exponent(x: Tensor, bits: int, what: str = "tensor") -> int:
    """The exponent that all of ``x`` shares.

    Args:
        x: floating point, any shape; as float32.
        what: its name, for the message.

    Raises:
        FixedPointError: NaN or infinity in it, or bits out of range.

    >>> shared_exponent(torch.tensor([0.3, -1.5]), 8)
    -6
    """
    check_bits(bits, what)
    if not x.numel():
        return LEAST_EXPONENT
    low, high = (float(end) for end in torch.aminmax(x.detach().float()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(x.detach().float(), what)
    return exponent_for(max(-low, high), bits, what)


def _check_size(x: Tensor, what: str) -> None:
    if x.numel() >= 2**31:  # random numbers are counted in 32 bits
        raise FixedPointError(f"{what}: {x.numel()} elements; expected fewer than 2**31")


def _not_finite(x: Tensor, what: str) -> FixedPointError:
    bad = x.numel() - int(x.isfinite().sum())
    return FixedPointError(f"{what}: {bad} of {x.numel()} values are NaN or infinite (shape {list(x.shape)}); they share no exponent")


def _overflow(y: Tensor, what: str) -> FixedPointError:
    bad = y.numel() - int(y.isfinite().sum())
    return FixedPointError(
        f"{what}: {bad} of {y.numel()} values (shape {list(y.shape)}) are no float32 when they are multiplied by the powers of two of the "
        'other operand; expected a product below 2**128 (scale the loss down, or take exponents="tensor")'
    )


def check_matrix(axis: int, x: Tensor, times: Tensor | None, what: str) -> None:
    """What :func:`to_fixed_point_by` takes.

    Raises:
        ValueError: no matrix, another axis than 0 and 1, or ``times`` of another shape or type.
    """
    if x.ndim != 2 or axis not in (0, 1):
        raise ValueError(f"{what}: {list(x.shape)}, axis {axis}; expected a matrix, and axis 0 or 1")
    expected = (1, x.shape[1]) if axis == 0 else (len(x), 1)
    if times is not None and (tuple(times.shape), times.dtype) != (expected, torch.int32):
        raise ValueError(
            f"{what}: times {list(times.shape)} of {times.dtype} for axis {axis} of {list(x.shape)}; expected int32 {list(expected)}"
        )


def exponent_for(largest: float, bits: int, what: str = "tensor") -> int:
    """The exponent of a tensor whose largest magnitude is ``largest``.

    >>> exponent_for(1.5, 8)
    -6
    """
    check_bits(bits, what)
    return max(math.frexp(largest)[1] - bits + 1, LEAST_EXPONENT) if largest else LEAST_EXPONENT


def to_fixed_point(
    x: Tensor, bits: int, stream: tuple[int, int] | None = None, *, exponent: int | None = None, what: str = "tensor"
) -> FixedPoint:
    """Map a tensor to integers with one exponent.

    Args:
        x: floating point, any shape; taken as float32.
        bits: 4 to 16, the sign among them.
        stream: round stochastically, by these two keys (``quantsim.numerics.random_bits.stream_of``) and an element's place in
            ``x``; ``None`` rounds to the nearest, half to even. The probability is that of the fraction to ``2**-24``.
        exponent: of a larger tensor that ``x`` is a part of; found in ``x`` by default.
        what: the tensor's name, for messages.

    Raises:
        FixedPointError: NaN or infinity in ``x``, or bits out of range.

    >>> q = to_fixed_point(torch.tensor([0.3, -1.5]), 8)
    >>> q.mantissa, q.exponent, q.value()
    (tensor([ 19, -96], dtype=torch.int8), -6, tensor([ 0.2969, -1.5000]))
    """
    found = shared_exponent(x, bits, what)  # looks for NaN and infinity, too
    exponent = found if exponent is None else exponent
    _check_size(x, what)
    flat, dtype = _plain(x.detach().float().reshape(-1)), mantissa_dtype(bits)
    numbers = torch.tensor([math.ldexp(1.0, -exponent), limit_of(bits)], device=x.device)
    if stream is None:
        mantissa = _kernel(_nearest, flat)(flat, numbers, dtype)
    else:
        keys = torch.tensor(stream, dtype=torch.int32, device=x.device)
        mantissa = _in_chunks(flat, numbers, dtype, keys) if not _fuses(flat) else _kernel(_stochastic, flat)(flat, numbers, dtype, keys, 0)
    return FixedPoint(mantissa.reshape(x.shape), exponent, bits)


def to_fixed_point_by(
    axis: int, x: Tensor, bits: int, stream: tuple[int, int] | None = None, *, times: Tensor | None = None, what: str = "tensor"
) -> FixedPoint:
    """Map a matrix ``[n, m]`` to integers with an exponent for each row (``axis`` 0) or each column (1).

    Args:
        times: exponents of powers of two that ``x`` is multiplied by first, int32: ``[1, m]`` for rows, ``[n, 1]`` for columns.

    Raises:
        FixedPointError: as :func:`to_fixed_point`.

    >>> to_fixed_point_by(0, torch.tensor([[0.3, -1.5], [0.003, 0.001]]), 8)
    FixedPoint(mantissa=tensor([[ 19, -96],
            [ 98,  33]], dtype=torch.int8), exponent=tensor([[ -6],
            [-15]], dtype=torch.int32), bits=8)
    """
    check_bits(bits, what)
    check_matrix(axis, x, times, what)
    _check_size(x, what)
    y = x.detach().float() if times is None else x.detach().float() * power_of_two(times)
    if not y.numel():
        shape = (len(x), 1) if axis == 0 else (1, x.shape[1])
        return FixedPoint(y.to(mantissa_dtype(bits)), torch.full(shape, LEAST_EXPONENT, dtype=torch.int32, device=x.device), bits)
    largest = y.abs().amax(1 - axis, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise _not_finite(x, what) if times is None or not bool(x.isfinite().all()) else _overflow(y, what)
    exponent = torch.where(largest > 0, largest.frexp().exponent - (bits - 1), LEAST_EXPONENT).clamp_min(LEAST_EXPONENT).int()
    flat = (y * power_of_two(-exponent)).reshape(-1)
    numbers = torch.tensor([1.0, limit_of(bits)], device=x.device)
    if stream is None:
        mantissa = _nearest(flat, numbers, mantissa_dtype(bits))
    else:
        mantissa = _in_chunks(flat, numbers, mantissa_dtype(bits), torch.tensor(stream, dtype=torch.int32, device=x.device))
    return FixedPoint(mantissa.reshape(x.shape), exponent, bits)


def from_accumulator(accumulator: Tensor, exponent: int | Tensor, bias: Tensor | None = None) -> Tensor:
    """The inverse mapping: ``accumulator * 2**exponent + bias`` as float32.

    Exact integers of any dtype come in, and are rounded once to 24 bits; scaling is exact unless the result itself is not a normal
    float32 (it is made of two factors, so that neither of them is infinite or zero where the result is not).

    Args:
        accumulator: ``[*, n]``, exact integers as int32, int64 or float64.
        exponent: from -252 to 252; a tensor broadcasts against ``accumulator``.
        bias: ``[n]``, added in float32.
    """
    if isinstance(exponent, Tensor):
        half = exponent.div(2, rounding_mode="floor")
        scaled = accumulator.float() * power_of_two(half) * power_of_two(exponent - half)
        return scaled if bias is None else scaled + bias.detach().float()
    factors = torch.tensor(factors_of(exponent), device=accumulator.device)
    if bias is None:
        flat = _plain(accumulator.reshape(-1))
        return _kernel(_inverse, flat)(flat, factors).reshape(accumulator.shape)
    rows = _plain(accumulator.reshape(-1, accumulator.shape[-1]))
    return _kernel(_inverse_with_bias, rows)(rows, factors, _plain(bias.detach().float())).reshape(accumulator.shape)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2**exponent``, exact: put together from its bits. Exponents are int32, of normal numbers of ``dtype`` (float32 or float64).

    >>> power_of_two(torch.tensor([-126, 0, 127], dtype=torch.int32)).tolist() == [2.0**-126, 1.0, 2.0**127]
    True
    """
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(dtype)
    return ((exponent.int() + 127) << 23).view(dtype)


def factors_of(exponent: int) -> tuple[float, float]:
    """Two factors that make ``2**exponent``, neither of them infinite or zero in float32."""
    half = exponent // 2 if abs(exponent) > -LEAST_EXPONENT else exponent
    return math.ldexp(1.0, half), math.ldexp(1.0, exponent - half)


def mantissa_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16


# ---- kernels: plain functions of tensors, that run as they are or compiled into one loop, with the same values ----


def _fuses(x: Tensor) -> bool:
    return fused_kernels_active() and min(x.shape) > 1  # sizes 0 and 1 would be compiled anew, for nothing


def _plain(x: Tensor) -> Tensor:
    """Contiguous, and as ``.data`` no view of another: else each kind of view would be compiled anew, up to a limit."""
    return x.contiguous().data


def _kernel(function: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    return compiled_kernel(function) if _fuses(x) else function


def _in_chunks(x: Tensor, numbers: Tensor, dtype: torch.dtype, keys: Tensor) -> Tensor:
    """:func:`_stochastic` part by part: its many passes then stay in the cache."""
    found = torch.empty(x.shape, dtype=dtype, device=x.device)
    for start in range(0, x.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        found[part] = _stochastic(x[part], numbers, dtype, keys, start)
    return found


def _nearest(x: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """``numbers``: ``[1 / step, limit]``."""
    return torch.clamp((x * numbers[0]).round(), -numbers[1], numbers[1]).to(dtype)


def _stochastic(x: Tensor, numbers: Tensor, dtype: torch.dtype, keys: Tensor, start: int) -> Tensor:
    y = x * numbers[0]
    low = y.floor()
    up = (y - low) * 2.0**RANDOM_BITS > random_bits(keys, start, x.shape[0])  # the fraction is exact, so integers stay as they are
    return torch.clamp(low + up, -numbers[1], numbers[1]).to(dtype)


def _inverse(accumulator: Tensor, factors: Tensor) -> Tensor:
    return accumulator.float() * factors[0] * factors[1]


def _inverse_with_bias(accumulator: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    return accumulator.float() * factors[0] * factors[1] + bias
