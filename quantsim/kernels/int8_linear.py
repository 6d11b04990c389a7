"""A linear layer on integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantsim.kernels.cpu import onednn
from quantsim.kernels.edges import Grid
from quantsim.kernels.int8_matmul import INT8_TERMS, exact_matmul

PostOp = Literal["none", "relu", "gelu"]
INSTEAD = "write it with LoweredModel.save_pretrained, or take the simulation's (sim.model)"


@dataclass(frozen=True)
class Output:
    """What one of the layers in a product gives: its width, the grid of its edge, or ``None`` for float32, and its weight's name."""

    width: int
    grid: Grid | None = None
    weight: str = ""


class Int8Linear(nn.Module):
    """``post_op(((q_x - zero_point) @ q_w.T) * (scale_x * scale_w) + bias)``, requantized where the edge that follows is quantized.

    The product is exact, accumulated in 32 bits; scales, bias and post-op are float32.

    Args:
        weight: ``q_w``, int8 ``[out, in]``; it is packed, and not kept beside.
        weight_scale: float32 ``[out]``.
        bias: float32 ``[out]``, or ``None``.
        grid: of ``q_x``.
        packs: run on oneDNN's kernel; else the same product in float32, for machines where that kernel isn't exact.
        name: of the weight.

    ``out`` is the width of several layers together where they read the same edge (query, key and value): ``outputs`` says
    what each of them gives; either all of them are requantized, or none.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    output_scale: Tensor
    output_bias: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, grid: Grid, packs: bool = True, name: str = "") -> None:
        super().__init__()
        self.grid, self.packs = grid, packs
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight_scale", weight_scale.float().repeat(self.out_features // weight_scale.numel()))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("no_zero_points", torch.zeros(self.out_features, dtype=torch.int32, device=weight.device), persistent=False)
        self.register_buffer("weight", onednn.qlinear_prepack(weight.contiguous(), None) if packs else weight.contiguous())
        self.outputs: Sequence[Output] = (Output(self.out_features, weight=name),)
        self.post_op: PostOp = "none"
        self.algorithm = "none"  # of GELU: none (erf) or tanh

    def integers(self) -> Tensor:
        """``q_w``, int8 ``[out, in]``, as it was given."""
        return self.weight.to_dense().t().contiguous() if self.packs else self.weight

    def parts(self) -> Iterator[tuple[str, slice]]:
        """The name of each layer's weight, and its rows in :meth:`integers`."""
        start = 0
        for out in self.outputs:
            yield out.weight, slice(start, start + out.width)
            start += out.width

    @property
    def requantizes(self) -> bool:
        return self.outputs[0].grid is not None

    def forward(self, q: Tensor, *own: Tensor) -> Tensor:
        """``[..., in]`` of ``grid.dtype`` → ``[..., out]``, float32 or the dtype of the outputs' grid.

        Args:
            own: scale and zero point of ``q``, ``[]`` each, where its range is its own (a dynamic edge) and not the grid's.
        """
        if not self.requantizes:
            return self._product(q, self.weight_scale, self.bias, None, *own)
        if len(self.outputs) == 1:
            return self._product(q, self.weight_scale, self.bias, self.outputs[0].grid, *own)
        return self._product(q, self.output_scale, self.output_bias, self._unit_grid, *own)

    def in_float(self, q: Tensor, *own: Tensor) -> Tensor:
        """What :meth:`forward` gives before it is requantized."""
        return self._product(q, self.weight_scale, self.bias, None, *own)

    def give(self, outputs: Sequence[Output]) -> None:
        """Set what the product gives.

        Several grids become one of scale 1 and zero point 0: ``round(y / s + z)`` is ``round(y / s) + z``, so each layer's scale
        goes into its channels' scales and its zero point into their bias.
        """
        self.outputs = tuple(outputs)
        if len(outputs) == 1 or not self.requantizes:
            return
        grids = [out.grid for out in outputs]
        widths = torch.tensor([out.width for out in outputs], device=self.weight_scale.device)
        assert all(grid is not None and grid.dtype == grids[0].dtype for grid in grids if grids[0] is not None)
        scales = self.weight_scale.new_tensor([grid.scale for grid in grids if grid]).repeat_interleave(widths)
        zero_points = self.weight_scale.new_tensor([grid.zero_point for grid in grids if grid]).repeat_interleave(widths)
        self.register_buffer("output_scale", self.weight_scale / scales, persistent=False)
        self.register_buffer("output_bias", zero_points if self.bias is None else self.bias / scales + zero_points, persistent=False)
        first = grids[0]
        assert first is not None
        self._unit_grid = Grid(1.0, 0, first.quant_min, first.quant_max)

    def _product(self, q: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Grid | None, *own: Tensor) -> Tensor:
        scale, zero_point = own or (self.grid.scale, self.grid.zero_point)
        scales = weight_scale * scale
        if not self.packs:
            return self._in_float32(q, scales, zero_point, bias, out)
        args: list[Any] = [1.0, 0, torch.float32] if out is None else [out.scale, out.zero_point, out.dtype]
        if q.dtype == torch.int8:  # oneDNN 3.12 has no kernel for int8 activations but its reference, thousands of times slower
            q, zero_point = torch.bitwise_xor(q, -128).view(torch.uint8), zero_point + 128  # q + 128
        unit: Any = 1.0
        if isinstance(zero_point, Tensor):  # the operator takes both as numbers, or both as tensors
            unit, zero_point = torch.ones_like(scales[:1]), zero_point.int().reshape(1)
        y: Tensor = onednn.qlinear_pointwise(
            q, unit, zero_point, self.weight, scales, self.no_zero_points, bias, *args, self.post_op, [], self.algorithm
        )
        return y

    def _in_float32(self, q: Tensor, scales: Tensor, zero_point: int | Tensor, bias: Tensor | None, out: Grid | None) -> Tensor:
        """The kernel's arithmetic, operation for operation: the same values to the bit (with GELU, which it approximates, nearly)."""
        y = exact_matmul(q.float() - zero_point, self.weight.float().t(), INT8_TERMS) * scales
        if bias is not None:
            y = y + bias
        if self.post_op == "relu":
            y = functional.relu(y)
        elif self.post_op == "gelu":
            y = functional.gelu(y, approximate=self.algorithm)
        if out is None:
            return y
        inverse = 1 / torch.tensor(out.scale, dtype=torch.float32)
        return (y * inverse + out.zero_point).round_().clamp_(out.quant_min, out.quant_max).to(out.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        """A copy that shares the packed weight: it is read-only, and torch can't copy it."""
        copy = self.__new__(type(self))
        nn.Module.__init__(copy)
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_buffers", "_non_persistent_buffers_set")})
        copy._buffers = dict(self._buffers)
        copy._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a lowered model can't be pickled (torch.save): {INSTEAD}")

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"a lowered model has no state_dict, for its weights are packed for the kernels of this machine: {INSTEAD}")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        raise TypeError("a lowered model takes no state_dict: load it into the simulation (sim.model) and lower that")

    def extra_repr(self) -> str:
        out = ", ".join(f"{out.width} × {'float32' if out.grid is None else out.grid.dtype}" for out in self.outputs)
        return f"in={self.in_features}, out={out}, post_op={self.post_op}"
