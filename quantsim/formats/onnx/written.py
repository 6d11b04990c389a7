"""Functions of integer tensors, written as ONNX by calling them: on a :class:`Written` every operator gives a node in place of a number.

So a polynomial or a rescale exists once, in ``quantsim.numerics``, and the file holds the very steps that torch runs. ONNX lacks two::

    x >> k     BitShift is for unsigned numbers: the sign bit is flipped before, and 2**(bits - 1 - k) taken away after
    x // y     Div cuts off: one less where it cut off what was negative
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_ir as ir

KINDS = {
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
BITS = {"INT32": 32, "INT64": 64}

Number = int  # as a type: `int` is a method of Written, as it is of a tensor


class Written:
    """An integer tensor that is not there: what is done to it becomes nodes of the graph that ``torch.onnx`` is writing."""

    def __init__(self, value: ir.Value, kind: str, shape: Sequence[Any]) -> None:
        from onnxscript import opset20

        self.value, self.kind, self.shape = value, kind, shape
        self.op: Any = opset20

    @classmethod
    def of(cls, x: ir.Value) -> Written:
        """A tensor that is in the graph."""
        assert x.dtype is not None
        assert x.shape is not None
        return cls(x, x.dtype.name, list(x.shape))

    def _made(self, value: ir.Value, kind: str | None = None) -> Written:
        """Of this one's kind, if not of another; its shape is looked at before anything is reduced."""
        return Written(value, kind or self.kind, self.shape)

    def to(self, dtype: torch.dtype | str) -> Written:
        import onnx_ir as ir

        kind = dtype if isinstance(dtype, str) else KINDS[dtype]
        return self if kind == self.kind else self._made(self.op.Cast(self.value, to=ir.DataType[kind].value), kind)

    def int(self) -> Written:
        return self.to("INT32")

    def number(self, x: Any) -> ir.Value:
        """The other side of an operator: of this kind, if it is a plain number."""
        import onnx_ir as ir

        if isinstance(x, Written):
            return x.value
        dtype = ir.DataType[self.kind]
        number: ir.Value = self.op.Constant(value=ir.serde.serialize_tensor(ir.tensor(np.array(x, dtype=dtype.numpy()), dtype=dtype)))
        return number

    def _with(self, op: str, x: Any, mirrored: bool = False, kind: str | None = None) -> Written:
        sides = (self.value, self.number(x))
        return self._made(getattr(self.op, op)(*(sides[::-1] if mirrored else sides)), kind)

    # ---- arithmetic ----

    def __add__(self, x: Any) -> Written:
        return self._with("Add", x)

    def __sub__(self, x: Any) -> Written:
        return self._with("Sub", x)

    def __rsub__(self, x: Any) -> Written:
        return self._with("Sub", x, mirrored=True)

    def __mul__(self, x: Any) -> Written:
        return self._with("Mul", x)

    __radd__, __rmul__, add_ = __add__, __mul__, __add__

    def __neg__(self) -> Written:
        return self._made(self.op.Neg(self.value))

    def abs(self) -> Written:
        return self._made(self.op.Abs(self.value))

    def sign(self) -> Written:
        return self._made(self.op.Sign(self.value))

    def __floordiv__(self, x: Any) -> Written:
        """By a positive number."""
        quotient: Written = self._with("Div", x)
        cut_off = self - quotient * x
        found: Written = quotient - (cut_off < 0).to(self.kind)
        return found

    def __rfloordiv__(self, x: Number) -> Written:
        """A positive number by positive numbers."""
        return self._with("Div", x, mirrored=True)

    def clamp(self, min: Number | None = None, max: Number | None = None) -> Written:
        found = self if min is None else self._with("Max", min)
        return found if max is None else found._with("Min", max)

    clamp_ = clamp

    # ---- bits ----

    def __and__(self, x: Any) -> Written:
        return self._with("BitwiseAnd", x)

    def __rshift__(self, by: Any) -> Written:
        bits, unsigned = BITS[self.kind], self.to(f"U{self.kind}")
        k, top = by.to(unsigned.kind) if isinstance(by, Written) else by, 1 << (bits - 1)
        shifted: Written = unsigned._with("BitwiseXor", top)._shifted(k, "RIGHT")
        less = unsigned._made(unsigned.number(top))._shifted(k, "RIGHT").to(self.kind) if isinstance(k, Written) or k == 0 else top >> k
        found: Written = shifted.to(self.kind) - less
        return found

    bitwise_right_shift_ = __rshift__

    def __lshift__(self, by: Any) -> Written:
        if not isinstance(by, Written):
            return self._with("Mul", 1 << by)
        unsigned = self.to(f"U{self.kind}")
        found: Written = unsigned._shifted(by.to(unsigned.kind), "LEFT").to(self.kind)
        return found

    def _shifted(self, by: Any, direction: str) -> Written:
        return self._made(self.op.BitShift(self.value, self.number(by), direction=direction))

    # ---- comparisons, reductions, look-ups ----

    def __lt__(self, x: Any) -> Written:
        return self._with("Less", x, kind="BOOL")

    def __gt__(self, x: Any) -> Written:
        return self._with("Greater", x, kind="BOOL")

    def sum(self, dim: Number, keepdim: bool = False, dtype: torch.dtype | None = None) -> Written:
        wide = self if dtype is None else self.to(dtype)
        return wide._made(self.op.ReduceSum(wide.value, self._axes(dim), keepdims=Number(keepdim)))

    def amax(self, dim: Number, keepdim: bool = False) -> Written:
        return self._made(self.op.ReduceMax(self.value, self._axes(dim), keepdims=Number(keepdim)))

    def _axes(self, dim: Number) -> ir.Value:
        axes: ir.Value = self.op.Constant(value_ints=[dim])
        return axes

    def __getitem__(self, index: Written) -> Written:
        return self._made(self.op.Gather(self.value, index.value))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in FUNCTIONS:
            return NotImplemented
        return FUNCTIONS[function](*args, **(kwargs or {}))


def _where(condition: Written, x: Written, y: Any) -> Written:
    return x._made(condition.op.Where(condition.value, x.value, x.number(y)))


FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Written]] = {
    torch.where: _where,
    torch.minimum: lambda x, y: x._with("Min", y),
    torch.zeros_like: lambda x: x * 0,
    torch.ones_like: lambda x: x * 0 + 1,
    torch.bitwise_left_shift: lambda x, by: x << by,
}
"""Functions of torch that are called by name on a :class:`Written`."""
