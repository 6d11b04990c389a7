"""What lies between two products of an integer graph, as a program over rows that one kernel runs in one pass (``rows.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantsim.kernels.build import library, why_not

SOURCE = Path(__file__).with_name("rows.cpp")
LEADING, NUMBERS = 5, 8  # axes before the last, and plain numbers of a step
TYPES = {torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.bool: 3}


class Op(IntEnum):
    """What a step does with the top of the stack; those of two operands take the one below it too."""

    PUSH = 0
    ADD = 1
    SUB = 2
    NEG = 3
    CLAMP = 4
    RESCALE = 5
    CHANNELS = 6
    GELU = 7
    TANH = 8
    NORMALIZE = 9
    SOFTMAX = 10
    WHERE = 11


class Step(NamedTuple):
    """An op, its plain numbers (in the order that ``rows.h`` names), and for CHANNELS the places of its two constants."""

    op: Op
    numbers: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()


class IntegerRows(nn.Module):
    """Elementwise integer ops, norms and softmax over the last axis, one after the other while a row is in the cache.

    Args:
        steps: on a stack of int32 rows; one row is left at the end.
        constants: int64 ``[width]``.
        dtype: of the result: int8, uint8 or int32.
    """

    def __init__(self, steps: Sequence[Step], constants: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.steps, self.dtype, self.depth = tuple(steps), dtype, _depth(steps)
        self.count = len(constants)
        for i, constant in enumerate(constants):
            self.register_buffer(f"constant_{i}", constant.contiguous(), persistent=False)
        self._program: Any = None  # the steps as the kernel takes them, and the addresses in them

    def forward(self, *operands: Tensor) -> Tensor:
        """int8, uint8, int32 or bool each, broadcast to one shape ``[…, width]`` → that shape."""
        shape = torch.broadcast_shapes(*(x.shape for x in operands))  # type: ignore[no-untyped-call]
        out = torch.empty(shape, dtype=self.dtype)
        if out.numel():
            program, _kept = self.program(operands, out)
            _kernel()(ctypes.byref(program))
        return out

    def program(self, operands: Sequence[Tensor | None], out: Tensor) -> tuple[Program, object]:
        """What the kernel takes, and what has to live as long as it does.

        Args:
            operands: of shapes that broadcast to that of ``out``; ``None``: the kernel has it.
            out: ``[…, width]``, contiguous, filled by the kernel.
        """
        shape = out.shape
        leading = (1,) * (LEADING + 1 - len(shape)) + tuple(shape[:-1])
        taken = [x if x is None else x.expand(shape) for x in operands]
        taken = [x if x is None or x.stride(-1) in (0, 1) or shape[-1] == 1 else x.contiguous() for x in taken]
        array = (_Operand * len(taken))()
        for place, x in zip(array, taken, strict=True):
            if x is None:
                continue
            strides = (0,) * (LEADING + 1 - x.ndim) + x.stride()[:-1]
            place.data, place.at, place.type = x.data_ptr(), (ctypes.c_int64 * LEADING)(*strides), TYPES[x.dtype]
            place.step = x.stride(-1) if shape[-1] > 1 else 1
        program = Program(width=shape[-1], operands=array, count=len(self.steps), depth=self.depth)
        program.sizes, program.steps = (ctypes.c_int64 * LEADING)(*leading), self._as_taken(shape[-1])
        program.out, program.type = out.data_ptr(), TYPES[self.dtype]
        return program, (taken, array)

    def _as_taken(self, width: int) -> Any:
        constants = [self.get_buffer(f"constant_{i}") for i in range(self.count)]
        if wrong := [x for x in constants if x.shape != (width,) or x.dtype != torch.int64]:
            raise ValueError(f"a rescale of {len(wrong[0])} channels of {wrong[0].dtype}; expected int64, and the rows' {width} elements")
        addresses = [x.data_ptr() for x in constants]
        if self._program is None or self._program[0] != addresses:
            array = (_Step * len(self.steps))()
            for place, step in zip(array, self.steps, strict=True):
                place.op, place.n = step.op, (ctypes.c_int64 * NUMBERS)(*step.numbers)
                if step.constants:
                    place.multiplier, place.offset = (addresses[i] for i in step.constants)
            self._program = addresses, array
        return self._program[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}  # addresses are this object's alone

    def extra_repr(self) -> str:
        return f"{' '.join(step.op.name.lower() for step in self.steps)} -> {str(self.dtype).removeprefix('torch.')}"


def _depth(steps: Sequence[Step]) -> int:
    depth = most = 0
    for step in steps:
        depth += {Op.PUSH: 1, Op.ADD: -1, Op.WHERE: -1}.get(step.op, 0)
        most = max(most, depth)
    if depth != 1:
        raise ValueError(f"a program over rows leaves {depth} of them; expected one")
    return most


@cache
def missing_for_rows(device: str = "cpu") -> str:
    """Why the kernel doesn't run here; empty where it does."""
    if device != "cpu":
        return f"rows.cpp is for CPUs, not for {device}"
    return why_not(_kernel)


# ---- the kernel ----


class _Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("at", ctypes.c_int64 * LEADING), ("step", ctypes.c_int64), ("type", ctypes.c_int32)]


class _Step(ctypes.Structure):
    _fields_ = [("op", ctypes.c_int32), ("n", ctypes.c_int64 * NUMBERS), ("multiplier", ctypes.c_void_p), ("offset", ctypes.c_void_p)]


class Program(ctypes.Structure):
    """``struct Program`` of ``rows.h``, field for field."""

    _fields_ = [
        ("sizes", ctypes.c_int64 * LEADING),
        ("width", ctypes.c_int64),
        ("operands", ctypes.POINTER(_Operand)),
        ("steps", ctypes.POINTER(_Step)),
        ("count", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("type", ctypes.c_int32),
    ]


@cache
def _kernel() -> Any:
    kernel = library(SOURCE).rows
    kernel.argtypes, kernel.restype = [ctypes.POINTER(Program)], None
    return kernel
