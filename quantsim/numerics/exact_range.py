"""From scale and zero point back to a range that gives them: the inverse of ``affine_params``, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from quantsim.config import QuantSpec
from quantsim.numerics.affine import AffineParams, affine_params, grid_range

REACH = 4
MOVES = sorted(((i, j) for i in range(-REACH, REACH + 1) for j in range(-REACH, REACH + 1)), key=lambda move: abs(move[0]) + abs(move[1]))


def exact_range(params: AffineParams, spec: QuantSpec, *, by_width: bool = False) -> tuple[Tensor, Tensor]:
    """A range with ``affine_params(low, high, spec) == params`` bit for bit: the ends of the grid, moved by a few ulps where they must be.

    The ends ``(quant_min - zero_point) * scale`` and ``(quant_max - zero_point) * scale`` are rounded, and the scale computed from
    them misses the one they were made of in its last bit for one asymmetric 8-bit range in six. Both ends are then moved, an ulp at
    a time and by no more than four, until it does not.

    Every pair that :func:`affine_params` gives has such a range, and so has every symmetric scale. Of other scales, an asymmetric
    one in about ``quant_max - quant_min`` has none: ``(high - low) / steps`` takes steps of ``1 + 1 / steps`` ulp and leaves it out.
    The ends then stay as they are, and the scale that follows is a neighbour.

    Args:
        params: ``scale`` and ``zero_point`` of shape ``[]``, or ``[C]``.
        spec: bits and symmetry.
        by_width: find a range with ``(high - low) / steps == scale`` on a symmetric grid too, for readers that compute it so.

    >>> spec = QuantSpec(bits=4)
    >>> params = affine_params(torch.tensor(-0.3), torch.tensor(1.1), spec)
    >>> low, high = exact_range(params, spec)
    >>> affine_params(low, high, spec).scale == params.scale
    tensor(True)
    """
    low_end, high_end = (end.detach().flatten() for end in grid_range(params))
    scale, zero_point = params.scale.detach().flatten(), params.zero_point.detach().flatten()
    low, high = low_end.clone(), high_end.clone()
    pending = torch.arange(len(scale), device=scale.device)  # [C] -> [those without a range yet]
    for down, up in MOVES:
        if not len(pending):
            break
        new_low, new_high = _moved(low_end[pending], down), _moved(high_end[pending], up)
        if by_width and spec.symmetric:
            fits = (new_high - new_low) / (spec.quant_max - spec.quant_min) == scale[pending]
        else:
            given = affine_params(new_low, new_high, spec)
            fits = (given.scale == scale[pending]) & (given.zero_point == zero_point[pending])
        low[pending[fits]], high[pending[fits]] = new_low[fits], new_high[fits]
        pending = pending[~fits]
    return low.reshape(params.scale.shape), high.reshape(params.scale.shape)


def _moved(x: Tensor, ulps: int) -> Tensor:
    """``x`` that many ulps further from 0, or nearer to it; 0 stays."""
    towards = torch.full_like(x, torch.inf).copysign(x) if ulps > 0 else torch.zeros_like(x)
    moved = x
    for _ in range(abs(ulps)):
        moved = torch.nextafter(moved, towards)
    return torch.where(x == 0, x, moved)
