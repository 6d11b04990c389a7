"""Convolutions of one to three dimensions, forward and backward in integers.

The mapped input is padded and gathered to columns (im2col), ``X_cols [batch * places, channels * kernel]``; then a convolution is a
linear layer (``quantsim.rewrites.integer_training.products``, which states the bounds)::

    Y  = inverse(X_cols @ W_hat.T) + bias
    dW = inverse(G_hat.T @ X_cols)
    dX = inverse(scatter(G_hat @ W_hat)): integers of overlapping windows are added in float64, exact below 2**53

Groups are a batch of products. Backward keeps the mapped input, not the columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from quantsim.kernels.integer_matmul import integer_matmul, multiply
from quantsim.numerics.fixed_point import FixedPoint, from_accumulator
from quantsim.rewrites.integer_training.op import Mapper, keep, kept
from quantsim.rewrites.integer_training.products import sum_rows

Sizes = Sequence[int]


def convolution(
    mapper: Mapper,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = (1,),
    padding: Sizes | str = (0,),
    dilation: Sizes = (1,),
    groups: int = 1,
) -> Tensor:
    """x ``[batch, channels, *sizes]``, weight ``[out, channels / groups, *kernel]``, bias ``[out]``; padding with zeros."""
    kernel = tuple(weight.shape[2:])
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    if isinstance(padding, str):
        around = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in around)
    else:
        pads = tuple((p, p) for p in _each(padding, kernel))
    window = Window(kernel, strides, dilations, pads)
    return _Convolution.apply(mapper, x, weight, bias, window, groups)  # type: ignore[no-any-return, no-untyped-call]


def _each(values: Sizes, kernel: Sizes) -> tuple[int, ...]:
    return tuple(values) * len(kernel) if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class Window:
    """Where a kernel looks: sizes an axis, and zeros before and after."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def out_sizes(self, sizes: Sizes) -> list[int]:
        """``[*sizes] -> [*places]``."""
        spans = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        rows = zip(sizes, self.padding, spans, self.stride, strict=True)
        return [(size + low + high - span - 1) // stride + 1 for size, (low, high), span, stride in rows]

    def places(self, sizes: Sizes, device: torch.device) -> Tensor:
        """For each place and kernel element, the number of the padded element that it looks at: ``[places, kernel]``."""
        padded = [size + low + high for size, (low, high) in zip(sizes, self.padding, strict=True)]
        index = torch.zeros([1] * (2 * len(sizes)), dtype=torch.long, device=device)
        out = self.out_sizes(sizes)
        for axis, size in enumerate(out):
            steps = torch.arange(size, device=device) * self.stride[axis]
            taps = torch.arange(self.kernel[axis], device=device) * self.dilation[axis]
            shape = [1] * (2 * len(sizes))
            shape[axis], shape[len(sizes) + axis] = size, self.kernel[axis]
            index = index + (steps[:, None] + taps).reshape(shape) * math.prod(padded[axis + 1 :])
        return index.reshape(math.prod(out), math.prod(self.kernel))

    def columns(self, m: Tensor) -> Tensor:
        """``[batch, channels, *sizes] -> [batch, places, channels, kernel]``."""
        padded = functional.pad(m, self._flat_padding())
        index = self.places(m.shape[2:], m.device)
        return padded.flatten(2)[:, :, index].transpose(1, 2)

    def scatter(self, columns: Tensor, sizes: Sizes) -> Tensor:
        """The transpose of :meth:`columns`: ``[batch, places, channels, kernel] -> [batch, channels, *sizes]``, overlaps added."""
        batch, _, channels, _ = columns.shape
        padded = [size + low + high for size, (low, high) in zip(sizes, self.padding, strict=True)]
        total = columns.new_zeros(batch, channels, math.prod(padded))
        index = self.places(sizes, columns.device)
        total.index_add_(2, index.flatten(), columns.transpose(1, 2).flatten(2))
        return functional.pad(total.reshape(batch, channels, *padded), [-p for p in self._flat_padding()])

    def _flat_padding(self) -> list[int]:
        return [p for pair in reversed(self.padding) for p in pair]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mapper: Mapper, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
        q, w = mapper.map(x, "activation"), mapper.map(weight, "weight")
        keep(ctx, q, w)
        ctx.mapper, ctx.window, ctx.groups = mapper, window, groups
        y = _ungrouped(multiply(_columns(q, window, groups), _grouped(w.mantissa.flatten(1), w, groups).t()), groups)
        y = y if bias is None else y + bias  # [batch * places, out]
        batch, *sizes = x.shape[0], *window.out_sizes(x.shape[2:])
        return y.reshape(batch, *sizes, weight.shape[0]).movedim(-1, 1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        (q, w), _ = kept(ctx)
        window, groups = ctx.window, ctx.groups
        g = ctx.mapper.map(grad.movedim(1, -1).reshape(-1, grad.shape[1]), "gradient")  # [batch * places, out]
        gradients = _grouped(g.mantissa.t(), g, groups)  # [groups, out / groups, batch * places]
        _, needs_x, needs_w, needs_b, _, _ = ctx.needs_input_grad
        dx = dw = None
        if needs_x:
            rows = _grouped(w.mantissa.flatten(1), w, groups)
            columns = integer_matmul(gradients.mantissa.mT, rows.mantissa, g.bits, w.bits).double()
            batch, channels, *sizes = q.mantissa.shape
            columns = _ungrouped(columns, groups).reshape(batch, math.prod(grad.shape[2:]), channels, math.prod(window.kernel))
            dx = from_accumulator(window.scatter(columns, sizes), g.exponent + w.exponent)
        if needs_w:
            dw = multiply(gradients, _columns(q, window, groups)).reshape(w.mantissa.shape)
        return None, dx, dw, sum_rows(g) if needs_b else None, None, None


def _columns(q: FixedPoint, window: Window, groups: int) -> FixedPoint:
    """``[batch * places, channels * kernel]``, or ``[groups, batch * places, channels / groups * kernel]``."""
    columns = window.columns(q.mantissa)
    columns = columns.reshape(-1, columns.shape[2] * columns.shape[3])
    if groups > 1:
        columns = columns.reshape(columns.shape[0], groups, -1).transpose(0, 1)
    return replace(q, mantissa=columns)


def _grouped(rows: Tensor, like: FixedPoint, groups: int) -> FixedPoint:
    """``[out, n]``, or ``[groups, out / groups, n]``."""
    return replace(like, mantissa=rows if groups == 1 else rows.reshape(groups, -1, rows.shape[1]))


def _ungrouped(y: Tensor, groups: int) -> Tensor:
    """``[groups, n, width] -> [n, groups * width]``."""
    return y if groups == 1 else y.transpose(0, 1).reshape(y.shape[1], -1)
