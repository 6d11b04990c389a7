"""The softmax and the layer norm of a simulation: in evaluation the same to the bit on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.quantize import is_finite
from quantsim.numerics.affine import straight_through
from quantsim.numerics.reproducible import layer_norm, softmax_on_grid
from quantsim.quantizers.exact_op import ExactOp, fits


class ExactSoftmax(ExactOp):
    """Softmax over the last axis of an edge of at most 8 bits: :func:`~quantsim.numerics.reproducible.softmax_on_grid`."""

    aten, op = torch.ops.aten.softmax.int, "softmax"

    def forward(self, x: Tensor, *options: Any) -> Tensor:
        """``[..., n]`` → ``[..., n]``; ``options`` are those of ATen's softmax."""
        if not (self.exact(x) and all(map(fits, self.quantizers)) and is_finite(x)):
            return self.in_float(x, *options)
        with torch.no_grad():
            y = softmax_on_grid(x, self.quantizers[0].affine_params().scale)
        return straight_through(self.in_float(x, *options), y) if x.requires_grad and torch.is_grad_enabled() else y


class ExactNorm(ExactOp):
    """Layer norm of a quantized edge: :func:`~quantsim.numerics.reproducible.layer_norm`."""

    aten, op = torch.ops.aten.layer_norm.default, "layer_norm"

    def forward(self, x: Tensor, shape: list[int], *options: Any) -> Tensor:
        """``[..., n]`` → ``[..., n]``; ``options`` are those of ATen's layer norm: weight, bias, eps, and whether cuDNN may be used."""
        if not self.exact(x):
            return self.in_float(x, shape, *options)
        with torch.no_grad():
            y = layer_norm(x, shape, *options[:3])
        wants = any(isinstance(t, Tensor) and t.requires_grad for t in (x, *options))
        return straight_through(self.in_float(x, shape, *options), y) if wants and torch.is_grad_enabled() else y
