"""What the exact ops of a simulation have in common: in evaluation their sums do not depend on an order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer


class ExactOp(nn.Module):
    """An op that sums values on the grids of quantizers: a product, a softmax, a norm.

    In evaluation its sums run over integers or in float64, so they do not depend on the number of threads, the batch or the library, and
    are to the bit those of the lowered model. In training, under autocast or ``torch.compile``, in other types than float32,
    while a quantizer is off, and of values that are not finite it is the floating-point op, which passes NaN on.

    Args:
        quantizers: those on whose grids the inputs of ``forward`` lie; they stay the graph's own.

    Attributes:
        aten: the floating-point op.
        op: its name, as ``quantsim.graph.roles.op_of`` has it.
    """

    aten: torch._ops.OpOverload
    op: str

    def __init__(self, *quantizers: FakeQuantizer) -> None:
        super().__init__()
        self.quantizers = quantizers  # in a tuple, for they are not submodules of this one

    def exact(self, *inputs: Tensor) -> bool:
        """The sums of these inputs are exact."""
        x = inputs[0]
        if self.training or x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        if any(other.dtype != torch.float32 for other in inputs) or not x.numel():
            return False
        return all(quantizer.calibrated for quantizer in self.quantizers)

    def in_float(self, *args: Any) -> Tensor:
        """The floating-point op."""
        y: Tensor = self.aten(*args)
        return y


def fits(quantizer: FakeQuantizer) -> bool:
    """An activation of at most 8 bits with one range."""
    return quantizer.spec.bits <= 8 and quantizer.spec.axis is None and not isinstance(quantizer, WeightQuantizer)
