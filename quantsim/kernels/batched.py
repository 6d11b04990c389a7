"""``int8_matmul`` of a batch of small matrices in one kernel (``batched.cpp``): calls of a library take longer than such products."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantsim.kernels.build import library, why_not

SOURCE = Path(__file__).with_name("batched.cpp")


@cache
def missing_for_batches() -> str:
    """Why the kernel doesn't run here; empty where it does."""
    return why_not(_kernel)


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``[batch, m, k]`` of int8 or uint8 and ``[batch, k, n]`` of int8, of any strides → int32 ``[batch, m, n]``."""
    batch, m, k, n = *a.shape, b.shape[-1]
    a = a if a.stride(-1) == 1 else a.contiguous()
    b = b if 1 in b.stride()[1:] else b.contiguous()
    transposed = b.stride(1) == 1
    out = torch.empty(batch, m, n, dtype=torch.int32)
    if not k:
        return out.zero_()
    if out.numel():
        starts = [torch.arange(batch) * x.stride(0) for x in (a, b)]
        _kernel()(
            ctypes.byref(
                _Batched(
                    a=a.data_ptr(),
                    b=b.data_ptr(),
                    a_row=a.stride(1),
                    b_row=b.stride(2 if transposed else 1),
                    a_at=starts[0].data_ptr(),
                    b_at=starts[1].data_ptr(),
                    a_signed=int(a.dtype == torch.int8),
                    transposed=int(transposed),
                    batch=batch,
                    m=m,
                    n=n,
                    k=k,
                    out=out.data_ptr(),
                )
            )
        )
    return out


class _Batched(ctypes.Structure):
    """``struct Batched`` of the source, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("a_row", "b_row")),
        *((name, ctypes.c_void_p) for name in ("a_at", "b_at")),
        *((name, ctypes.c_int32) for name in ("a_signed", "transposed")),
        *((name, ctypes.c_int64) for name in ("batch", "m", "n", "k")),
        ("out", ctypes.c_void_p),
    ]


@cache
def _kernel() -> Any:
    kernel = library(SOURCE).batched
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Batched)], None
    return kernel
