"""What the products of a simulation have in common: in evaluation their sums are those of the integers they stand for, exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer


class ExactProduct(nn.Module):
    """A product of two tensors on the grids of quantizers of at most 8 bits.

    In evaluation its sums run over integers, so they do not depend on the number of threads, the batch or the machine, and are to the
    bit those of the lowered model. In training, under autocast or ``torch.compile``, in other types than float32, and while a
    quantizer is off it is the floating-point op.

    Args:
        quantizers: those on whose grids the two inputs of ``forward`` lie; they stay the graph's own.

    Attributes:
        op: what ``quantsim.graph.roles.op_of`` calls it, the name of a function of ``torch.nn.functional`` or ``torch``.
    """

    op: str

    def __init__(self, *quantizers: FakeQuantizer) -> None:
        super().__init__()
        self.quantizers = quantizers  # in a tuple, for they are not submodules of this one

    def on_integers(self, *inputs: Tensor) -> bool:
        """The sums of these two inputs run over integers."""
        x, other = inputs
        if self.training or x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype == other.dtype == torch.float32 and x.numel() > 0 and all(quantizer.calibrated for quantizer in self.quantizers)

    def in_float(self, *args: Tensor | None) -> Tensor:
        """The floating-point op."""
        raise NotImplementedError


def fits(quantizer: FakeQuantizer) -> bool:
    """An activation of at most 8 bits with one range."""
    return quantizer.spec.bits <= 8 and quantizer.spec.axis is None and not isinstance(quantizer, WeightQuantizer)
