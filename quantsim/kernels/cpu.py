"""Whether this machine's integer kernels are exact."""

from __future__ import annotations

from functools import cache

import torch

onednn = torch.ops.onednn


def missing_for_int8(device: torch.device | str = "cpu") -> str:
    """Why products of integers don't run on oneDNN's kernels here; empty where they do.

    It is tried, not looked up: without VNNI (int8 dot products that accumulate in 32 bits) the x86 kernels add pairs of
    ``uint8 × int8`` products in 16 bits, which saturate, and return about half of the largest sums without a word
    (seen with torch 2.13 under ``ONEDNN_MAX_CPU_ISA=AVX512_CORE``, a limit that torch's own CPU flags don't notice).
    """
    if torch.device(device).type != "cpu":
        return f"oneDNN's int8 kernels are for CPUs, not for {torch.device(device).type}"
    return _missing_on_cpu()


@cache
def _missing_on_cpu() -> str:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    width = 256  # enough for the saturating kernels to be chosen, and for sums to saturate in them
    found = float(largest_product(width))
    if found != 255 * 127 * width:
        return (
            f"this CPU's int8 kernels saturate: the product of the largest integers, {255 * 127 * width}, came out as {found:.0f} "
            "(int8 kernels need AVX-512 VNNI, AVX-VNNI or AMX)"
        )
    return ""


def largest_product(width: int) -> torch.Tensor:
    """``sum(255 * 127)`` over ``width`` terms, as the kernel computes it."""
    x, weight = torch.full((32, width), 255, dtype=torch.uint8), torch.full((64, width), 127, dtype=torch.int8)
    packed = onednn.qlinear_prepack(weight, list(x.shape))
    one, zero = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    out: torch.Tensor = onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return out[0, 0]
