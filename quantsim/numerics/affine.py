"""Affine quantization: a range becomes a scale and a zero point; values become integers and come back.

One equation for everything here::

    q     = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    x_hat = (q - zero_point) * scale

Divide, round half to even, then add the zero point. The zero point is an integer, so the same values follow from
``round(x / scale)`` clamped to ``[quant_min - zero_point, quant_max - zero_point]``: the *signed grid*, on which
``x_hat`` is just ``integer * scale``. Everything below works on that grid and never stores ``q``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantsim.config import QuantSpec


@dataclass(frozen=True)
class AffineParams:
    """The quantization of one tensor: ``scale`` and ``zero_point`` of shape ``[]``, or ``[C]`` along ``axis``."""

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None

    def broadcast(self, values: Tensor, rank: int) -> Tensor:
        """``[C] -> [1, …, C, …, 1]`` with ``C`` at ``axis`` of a tensor of ``rank`` axes."""
        if self.axis is None:
            return values
        shape = [1] * rank
        shape[self.axis] = -1
        return values.reshape(shape)


def round_ste(x: Tensor) -> Tensor:
    """``round(x)``, half to even, with the gradient of the identity (straight-through estimator)."""
    return x + (x.round() - x).detach()


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` to the bit, with the gradient of ``x``.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> straight_through(2 * x, torch.tensor([7.0])).backward()
    >>> x.grad
    tensor([2.])
    """
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):  # type: ignore[no-untyped-def]
        return value.clone()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` to the bit, with its gradient multiplied by ``factor``.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> scale_gradient(x, 0.5).backward()
    >>> x.grad
    tensor(0.5000)
    """
    return x.detach() + (x - x.detach()) * factor


def smallest_range(dtype: torch.dtype) -> float:
    """The width given to a range that is empty (a tensor of zeros): the smallest whose scale is a normal number at 16 bits."""
    return torch.finfo(dtype).tiny * 2**17


def affine_params(minimum: Tensor, maximum: Tensor, spec: QuantSpec) -> AffineParams:
    """Scale and zero point of the range ``[minimum, maximum]``, forced to hold 0.

    Asymmetric::

        scale = (max - min) / (quant_max - quant_min);   zero_point = quant_min - round(min / scale)

    Symmetric (AIMET; torchao's variant without clipping error)::

        scale = max(max / quant_max, min / quant_min);   zero_point = 0

    Args:
        minimum, maximum: ``[]``, or ``[C]`` for a spec with an axis.
        spec: bits and symmetry.

    Differentiable: rounding the zero point is straight-through; at an empty range the scale is constant.
    """
    low = _at_least_float32(minimum).clamp(max=0.0)
    high = _at_least_float32(maximum).clamp(min=0.0)
    floor = smallest_range(low.dtype)
    if spec.symmetric:
        scale = torch.maximum(high / spec.quant_max, low / spec.quant_min).clamp(min=floor / (spec.quant_max - spec.quant_min))
        zero_point = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (spec.quant_max - spec.quant_min)).clamp(min=floor / (spec.quant_max - spec.quant_min))
        zero_point = spec.quant_min - round_ste(low / scale)
    return AffineParams(scale, zero_point, spec.quant_min, spec.quant_max, spec.axis)


def grid_range(params: AffineParams) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value that the grid holds, ``[]`` or ``[C]``."""
    low = (params.quant_min - params.zero_point) * params.scale
    high = (params.quant_max - params.zero_point) * params.scale
    return low, high


def quantize(x: Tensor, params: AffineParams) -> Tensor:
    """``q`` of the module's equation, computed in at least float32, as int32 of ``x``'s shape."""
    scale, zero_point = params.broadcast(params.scale, x.ndim), params.broadcast(params.zero_point, x.ndim)
    return (_divide(x, scale).round_() + zero_point).clamp(params.quant_min, params.quant_max).to(torch.int32)


def dequantize(q: Tensor, params: AffineParams) -> Tensor:
    """``x_hat`` of the module's equation, in the dtype of the scale."""
    scale, zero_point = params.broadcast(params.scale, q.ndim), params.broadcast(params.zero_point, q.ndim)
    return (q.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, params: AffineParams, overwrite: bool = False) -> Tensor:
    """``dequantize(quantize(x))`` in floating point, with gradients for ``x``, scale and zero point.

    With ``y = x / scale``, ``r = round(y)``, ``low = quant_min - zero_point``, ``high = quant_max - zero_point`` and
    the incoming gradient ``g``::

        dL/dx          = g where low <= r <= high, else 0
        dL/dscale      = sum g * (r - y) inside + sum g * clamp(r, low, high) outside
        dL/dzero_point = -scale * sum g outside

    Sums run over the elements that share a scale. This is autograd of the written-out formula with straight-through
    rounding (Esser et al., LSQ, 2020, eq. 3; AIMET's range learning).

    Computed in at least float32, whatever the autocast dtype; the result has ``x``'s dtype.

    Args:
        overwrite: where no gradient is asked for, the result may take ``x``'s memory. Fresh memory costs more than the
            arithmetic: of the four passes over a tensor, the one that writes to new pages takes longer than the other three.

    >>> from quantsim.config import QuantSpec
    >>> params = affine_params(torch.tensor(-1.0), torch.tensor(3.0), QuantSpec(bits=2))
    >>> fake_quantize(torch.tensor([-9.0, 0.2, 1.0, 9.0]), params)
    tensor([-1.3333,  0.0000,  1.3333,  2.6667])
    """
    if torch.is_grad_enabled() and (x.requires_grad or params.scale.requires_grad or params.zero_point.requires_grad):
        return _FakeQuantize.apply(x, params.scale, params.zero_point, params)  # type: ignore[no-any-return, no-untyped-call]
    low, high = _bounds(params, x.ndim)
    scale = params.broadcast(params.scale, x.ndim)
    y = x.div_(scale) if overwrite and x.dtype == scale.dtype else _divide(x, scale)
    return _clamp_(y.round_(), low, high).mul_(scale).to(x.dtype)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` as a fresh tensor of at least float32."""
    return torch.div(_at_least_float32(x), scale)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


Bound = float | Tensor


def _bounds(params: AffineParams, rank: int) -> tuple[Bound, Bound]:
    """The ends of the signed grid: numbers where all ranges share a zero point, for clamping to numbers is 10 times faster."""
    zero_point = params.zero_point
    if params.quant_min < 0:
        return float(params.quant_min), float(params.quant_max)
    if zero_point.numel() == 1:
        offset = zero_point.item()
        return params.quant_min - offset, params.quant_max - offset
    zero_point = params.broadcast(zero_point, rank)
    return params.quant_min - zero_point, params.quant_max - zero_point


def _clamp_(x: Tensor, low: Bound, high: Bound) -> Tensor:
    return x.clamp_(low, high)  # type: ignore[arg-type]  # both numbers or both tensors


class _FakeQuantize(torch.autograd.Function):
    """:func:`fake_quantize` with its gradients, in as few passes over a tensor as they need.

    Kept for backward: ``y``, and the result, which most ops that come next keep anyway. ``sum g * clamp(r)`` is
    ``sum g * x_hat / scale``, so nothing is rounded again; a result in 16 bits is too coarse for that and is computed anew.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, params):  # type: ignore[no-untyped-def]
        low, high = _bounds(params, x.ndim)
        wide = params.broadcast(scale, x.ndim)
        y = _divide(x, wide)
        x_hat = _clamp_(y.round(), low, high).mul_(wide).to(x.dtype)
        ctx.save_for_backward(y, x_hat if x_hat.dtype == y.dtype else None, scale, wide)
        ctx.bounds, ctx.axis, ctx.dtype = (low, high), params.axis, x.dtype
        return x_hat

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        y, x_hat, scale, wide = ctx.saved_tensors
        low, high = ctx.bounds
        g = g.to(y.dtype)
        inside = _where_inside(g, y, low, high)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            if x_hat is None:
                x_hat = _clamp_(y.round(), low, high).mul_(wide)
            grad_scale = _sum(g, x_hat, ctx.axis) / scale - _sum(inside, y, ctx.axis)
        if ctx.needs_input_grad[2]:
            grad_zero_point = -scale * (_sum(g, None, ctx.axis) - _sum(inside, None, ctx.axis))
        return inside.to(ctx.dtype), grad_scale, grad_zero_point, None


def _where_inside(g: Tensor, y: Tensor, low: Bound, high: Bound) -> Tensor:
    """``g`` where ``low <= round(y) <= high``, else 0.

    Half rounds to even, so half a step outside is inside where the end of the grid is even: the open interval of
    ``hardtanh_backward``, one pass, is then a number wider.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        r = y.round()
        return torch.where((r >= low) & (r <= high), g, 0.0)
    ends = torch.tensor([low - 0.5, high + 0.5], dtype=y.dtype)
    outward = torch.tensor([-torch.inf, torch.inf], dtype=y.dtype)
    even = torch.tensor([low % 2 == 0, high % 2 == 0])
    below, above = torch.where(even, torch.nextafter(ends, outward), ends).tolist()
    return torch.ops.aten.hardtanh_backward(g, y, below, above)  # type: ignore[no-any-return]


def _sum(a: Tensor, b: Tensor | None, axis: int | None) -> Tensor:
    """Sum of ``a * b`` (of ``a`` where ``b`` is None) over all axes but ``axis``: ``[]`` or ``[C]``."""
    if axis is None:
        return a.sum() if b is None else torch.dot(a.reshape(-1), b.reshape(-1))
    axis %= a.ndim
    others = [i for i in range(a.ndim) if i != axis]
    product = a if b is None else a * b
    return product.sum(others) if others else product.clone()
