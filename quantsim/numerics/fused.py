"""``fake_quantize`` as one kernel forward and one backward, made by ``torch.compile``; and other functions of a few lines.

The eager form makes about four passes over a tensor forward and six backward, most of them over memory and not
arithmetic. Fused, each element is read and written once either way. What is compiled are these few lines, not the
model: seconds for the first tensor of a kind, nothing for other shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantsim.numerics.affine import AffineParams

_active = False


def fused_kernels_active() -> bool:
    """Inside :func:`fused_kernels`."""
    return _active


@contextmanager
def fused_kernels(active: bool = True) -> Iterator[bool]:
    """Let what is trained through run as fused kernels inside the ``with`` block: fake quantizers; in integer training LayerNorm, and the
    mappings to integers and back where they have no kernel in C++.

    Values are those of the eager form; sums (the gradients of ranges) differ in float rounding.

    Yields:
        whether it is so: false where ``active`` is, and, with a warning, where this machine cannot compile.
    """
    global _active
    before = _active
    _active = active and _can_compile()
    try:
        yield _active
    finally:
        _active = before


@cache
def _can_compile() -> bool:
    one = torch.ones(2)
    try:
        with torch.no_grad():
            compiled_kernel(_forward)(one, one[0].data, one[0].data, one[0].data)
    except Exception as error:  # no compiler, no headers, a read-only cache folder: each fails in its own way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"elementwise kernels run unfused: torch.compile fails here ({reason}). A C++ compiler (g++) is needed", stacklevel=4)
        return False
    return True


def fused_fake_quantize(x: Tensor, params: AffineParams) -> Tensor:
    """``affine.fake_quantize`` with the same values and gradients; ``x`` of any shape."""
    zero_point = params.zero_point
    return _Fused.apply(x, params.scale, zero_point, params)  # type: ignore[no-any-return, no-untyped-call]


class _Fused(torch.autograd.Function):
    """Kept for backward: the input as it is, and three numbers a range."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, params):  # type: ignore[no-untyped-def]
        low, high = params.quant_min - zero_point, params.quant_max - zero_point
        ctx.save_for_backward(x, scale, low, high)
        ctx.axis = params.axis
        rows = _rows(x, params.axis)
        return _unrow(compiled_kernel(_forward)(rows, *_columns(rows, scale, low, high)), x, params.axis)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, scale, low, high = ctx.saved_tensors
        rows = _rows(x, ctx.axis)
        grad, grad_scale, outside = compiled_kernel(_backward)(_rows(g, ctx.axis), rows, *_columns(rows, scale, low, high))
        return _unrow(grad, x, ctx.axis), grad_scale, -scale * outside, None


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x_hat`` of ``x`` ``[n]`` or ``[C, n]``; the other three ``[]`` or ``[C, 1]``."""
    return (torch.clamp((x.to(scale.dtype) / scale).round(), low, high) * scale).to(x.dtype)


def _backward(g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``dL/dx``, ``dL/dscale`` and ``sum g`` outside of the range, as ``affine.fake_quantize`` has them; sums ``[]`` or ``[C]``."""
    g, y = g.to(scale.dtype), x.to(scale.dtype) / scale
    r = y.round()
    inside = torch.where((r >= low) & (r <= high), g, 0.0)
    return inside.to(x.dtype), (g * torch.clamp(r, low, high) - inside * y).sum(-1), (g - inside).sum(-1)


@cache
def compiled_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """``[…] -> [n]``, or with an axis ``[…, C, …] -> [C, n]``: two kinds of tensors, whatever the shapes of a model.

    Contiguous and, as ``.data``, no view of another: else each kind of view would be compiled anew, up to a limit.
    """
    rows = x.reshape(-1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows.contiguous().data


def _columns(rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """``[] -> []``, ``[C] -> [C, 1]``, as ``.data``: a kernel is compiled once, whether or not a range is learned."""
    return tuple(value.data if rows.ndim == 1 else value.data[:, None].data for value in values)


def _unrow(rows: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Back to the shape of ``x``."""
    if axis is None:
        return rows.reshape(x.shape)
    moved = x.movedim(axis, 0).shape
    return rows.reshape(moved).movedim(0, axis)
