"""A product of two activations in a simulation (an attention's scores, its context): in evaluation its sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from quantsim.kernels.int8_matmul import exact_matmul
from quantsim.quantizers.exact_op import ExactOp, fits
from quantsim.quantizers.fake_quantizer import FakeQuantizer


class ExactMatmul(ExactOp):
    """``a @ b``, where ``a = r_a * s_a`` and ``b = r_b * s_b``.

    In evaluation the sum runs over integers, and three roundings follow::

        y = float32(r_a @ r_b) * (s_a * s_b)

    Args:
        a, b: the quantizers on whose grids the inputs of :meth:`forward` lie.
    """

    aten, op = torch.ops.aten.matmul.default, "matmul"

    def __init__(self, a: FakeQuantizer, b: FakeQuantizer) -> None:
        super().__init__(a, b)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., m, k]`` and ``[..., k, n]`` → ``[..., m, n]``."""
        if not (self.exact(a, b) and all(map(fits, self.quantizers))):
            return self.in_float(a, b)
        with torch.no_grad():
            scale_a, scale_b = (quantizer.affine_params().scale for quantizer in self.quantizers)
            integers = (torch.div(a, scale_a).round_(), torch.div(b, scale_b).round_())
            product = exact_matmul(*integers).mul_(scale_a * scale_b)
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return _Product.apply(a, b, product)  # type: ignore[no-any-return, no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """The exact product, with the gradients of the floating-point one."""

    @staticmethod
    def forward(ctx, a, b, product):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return product

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        of_a, of_b, _ = ctx.needs_input_grad
        return (
            (g @ b.transpose(-1, -2)).sum_to_size(a.shape) if of_a else None,
            (a.transpose(-1, -2) @ g).sum_to_size(b.shape) if of_b else None,
            None,
        )
