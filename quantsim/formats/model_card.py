"""The model card of a saved simulation: what it is, how to load it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from quantsim.config import QuantConfig
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer

TEXT = """\
---
library_name: transformers
tags:
- quantsim
- quantized
---

# {architecture}, {name}

Simulated in integers with quantsim, config `{name}`: weights {weights}; activations {activations}; attention mask {mask}.
{counts}

```python
import quantsim.hf
from transformers import {architecture}

model = {architecture}.from_pretrained("path or id of this repository")
```
{measured}"""


def model_card(architecture: str, config: QuantConfig, quantizers: Mapping[str, FakeQuantizer], metrics: Mapping[str, float]) -> str:
    """``README.md`` in the form of the Hub.

    Args:
        metrics: by name, as ``Trainer.evaluate`` gives them.

    Raises:
        ValueError: a metric that is no number.
    """
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metrics: {name} is {value!r}; expected a number")
    table = tabulate(list(metrics.items()), headers=("metric", "value"), tablefmt="github", floatfmt=".4g")
    on_weights = sum(isinstance(q, WeightQuantizer) for q in quantizers.values())
    calibrated = sum(q.calibrated for q in quantizers.values())
    return TEXT.format(
        architecture=architecture,
        name=config.name,
        weights=config.weights or "in floating point",
        activations=config.activations or "in floating point",
        mask="as it is" if config.mask_clamp is None else f"clamped to {config.mask_clamp:g}",
        counts=f"{on_weights} quantizers of weights and {len(quantizers) - on_weights} of activations, {calibrated} with a range.",
        measured=f"\nMeasured:\n\n{table}\n" if metrics else "",
    )
