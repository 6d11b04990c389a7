"""A linear of a simulation: in evaluation its sums are those of the integers it stands for, exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.kernels.cpu import missing_for_int8
from quantsim.kernels.edges import Grid
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.kernels.quantize import finite_to_integers, is_finite
from quantsim.quantizers.exact_op import ExactOp
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer


class ExactLinear(ExactOp):
    """``x @ weight.T + bias``, where ``x = r_x * s_x`` and ``weight = r_w * s_w``.

    In evaluation the sum runs over integers, and four roundings follow, those of ONNX Runtime too::

        y = float32(r_x @ r_w.T) * (s_x * s_w) + bias

    Where the lowered model's kernel is exact it does the work here too, several times faster than floats.

    Args:
        x, weight: the quantizers on whose grids the inputs of :meth:`forward` lie.
    """

    aten, op = torch.ops.aten.linear.default, "linear"

    def __init__(self, x: FakeQuantizer, weight: WeightQuantizer) -> None:
        super().__init__(x, weight)
        self._packed: tuple[Tensor, Int8Linear] | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` ``[..., in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]`` → ``[..., out]``."""
        product = q = None
        if self.exact(x, weight) and fits_int8(*self.quantizers) and x.ndim > 1:
            with torch.no_grad():
                product = self._product(weight, None if bias is None else bias.detach())
                q = None if product is None else finite_to_integers(x, product.grid)
        if product is None or q is None:
            self._packed = None
            return self.in_float(x, weight, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return _Product.apply(x, weight, bias, product, q)  # type: ignore[no-any-return, no-untyped-call]
        return product(q)  # type: ignore[no-any-return]

    def _product(self, weight: Tensor, bias: Tensor | None) -> Int8Linear | None:
        """The weight packed, once for as long as its quantizer gives the same tensor; ``None`` where it or a range is not finite."""
        inputs, weights = self.quantizers
        params = inputs.affine_params()
        if not is_finite(params.scale):
            return None
        grid = Grid.of(params)
        if self._packed is not None and self._packed[0] is weight:
            product = self._packed[1]
            product.grid, product.bias = grid, bias
            return product
        scale = weights.affine_params().scale
        if not (is_finite(weight) and is_finite(scale)):
            return None
        integers = (weight / scale.reshape(-1, 1)).round().to(torch.int8)
        product = Int8Linear(integers, scale, bias, grid, not missing_for_int8(weight.device), weights.name)
        self._packed = None if weight.requires_grad else (weight, product)  # one with a gradient is made anew for each call
        return product

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # a copy packs its own


def fits_int8(x: FakeQuantizer, weight: FakeQuantizer) -> bool:
    """An activation of at most 8 bits with one range, and a weight that an integer product takes."""
    return is_int8_weight(weight.spec) and x.spec.bits <= 8 and x.spec.axis is None and not isinstance(x, WeightQuantizer)


def is_int8_weight(spec: QuantSpec) -> bool:
    """Symmetric, at most 8 bits, one range or one for each output channel (axis 0 of ``[out, in]``)."""
    return spec.symmetric and spec.bits <= 8 and spec.axis in (None, 0)


class _Product(torch.autograd.Function):
    """The exact product, with the gradients of the floating-point linear."""

    @staticmethod
    def forward(ctx, x, weight, bias, product, q):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return product(q)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])  # [*, out] -> [rows, out]
        return (
            g @ weight if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
            None,
        )
