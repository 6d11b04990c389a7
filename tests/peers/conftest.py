"""aimet-torch brings torchvision, whose wheel expects operators that a CPU-only torch does not have: they are declared here.

Before anything else is imported, for ``transformers`` takes up torchvision where it finds it.
"""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("aimet_torch") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        TORCHVISION = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
