"""A checkpoint of transformers' ``ibert`` → a simulation that computes on integers.

I-BERT's layers are RoBERTa's with quantizers written into them (``QuantLinear``, ``QuantAct``, ``IntLayerNorm``). Here the weights go
into the RoBERTa model of the same head, and what ``QuantAct`` found becomes the range of the edge that it stood on: with symmetric
8 bits, scale ``max(|x_min|, |x_max|) / 127``, as there. Its integers differ: scales are passed rightly from layer to layer, and pooler and
heads are integers too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, RobertaConfig

from quantsim.config import QuantConfig, near
from quantsim.formats.checkpoint import CheckpointError
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.rewrites.insert_quantizers import weights_of
from quantsim.sim import QuantSim

IBERT, ROBERTA = "ibert", "roberta"
UNSET = 1.1e-5
"""A ``QuantAct`` that never saw a tensor holds ±1e-5."""
EDGES = {
    r"embeddings\.LayerNorm\.output": "embeddings.output_activation",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.output": r"encoder.layer.\1.attention.self.\2_activation",
    r"encoder\.layer\.(\d+)\.attention\.self\.matmul_1": r"encoder.layer.\1.attention.self.output_activation",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.output": r"encoder.layer.\1.pre_intermediate_act",
    r"encoder\.layer\.(\d+)\.intermediate\.intermediate_act_fn\.output": r"encoder.layer.\1.pre_output_act",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.output": r"encoder.layer.\1.output.output_activation",
}
"""An edge of ours → the ``QuantAct`` that stands on it, below the encoder."""
FIXED = {r".*\.attention\.self\.softmax": (0.0, 255 / 256), r".*\btanh|.*pooler\.activation\.output": (-1.0, 1.0)}
"""Ranges that follow from the function: softmax has scale 2⁻⁸; heads are in floating point there and have none."""


def from_ibert(source: PreTrainedModel | str | Path) -> QuantSim:
    """The simulation (preset ``"ibert"``) of an I-BERT model that was trained with ``quant_mode``.

    ``from_ibert(folder).integer_only()`` is its integer-only form. An edge that I-BERT leaves in floating point and whose range does
    not follow from its function (before the decoder of a masked LM) stays without one; ``compute_encodings`` calibrates all.

    Args:
        source: a model with ``config.model_type == "ibert"``, a folder of one, or a Hub id.

    Raises:
        CheckpointError: another kind of model, weights that are missing, or ranges that training never set.
    """
    model = source if isinstance(source, PreTrainedModel) else _read(source)
    if model.config.model_type != IBERT:
        raise CheckpointError(f"{type(model).__name__}: model_type is {model.config.model_type!r}; expected {IBERT!r}")
    sim = QuantSim(as_roberta(model), QuantConfig.preset(IBERT), in_place=True)
    for of_weight, weight in weights_of(sim.graph):
        of_weight.set_range(*_extremes(weight, of_weight))
    state = model.state_dict()
    for name, quantizer in sim.quantizers.items():
        for low, high in _range_of(name, state):
            quantizer.set_range(low, high)
    return sim


def as_roberta(model: PreTrainedModel) -> PreTrainedModel:
    """The same floating-point model as a RoBERTa, in eval mode: what it gives with ``quant_mode`` off."""
    name = type(model).__name__.replace("IBert", "Roberta")
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "quant_mode", "force_dequant", "architectures")}
    plain: PreTrainedModel = getattr(transformers, name)(RobertaConfig(**values))
    given = {k.replace(f"{IBERT}.", f"{ROBERTA}.", 1): x for k, x in model.state_dict().items()}
    needed = plain.state_dict()
    if missing := sorted(needed.keys() - given.keys()):
        raise CheckpointError(f"{type(model).__name__}: has no weight {missing[0]} (nearest: {near(missing[0], given, 1)})")
    plain.load_state_dict({k: given[k] for k in needed})
    plain.train(False)
    return plain


def _read(source: str | Path) -> PreTrainedModel:
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (getattr(config, "architectures", None) or ["IBertForSequenceClassification"])[0]
        if config.model_type != IBERT:
            raise CheckpointError(f"{source}: model_type is {config.model_type!r}; expected {IBERT!r}")
        model: PreTrainedModel = getattr(transformers, architecture).from_pretrained(source)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: not a model of transformers ({error})") from error
    return model


def _extremes(weight: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """``±max|w|`` of each output channel, or of the table."""
    largest = weight.detach().abs().amax() if quantizer.spec.axis is None else weight.detach().abs().amax(dim=1)  # [out, in] -> [out]
    return -largest, largest


def _range_of(name: str, state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The range of an edge, if I-BERT has one for it.

    Raises:
        CheckpointError: training never set it.
    """
    for pattern, ends in FIXED.items():
        if re.fullmatch(pattern, name):
            yield torch.tensor(ends[0]), torch.tensor(ends[1])
            return
    inner = name.removeprefix(f"{ROBERTA}.")
    for pattern, place in EDGES.items():
        if not (match := re.fullmatch(pattern, inner)):
            continue
        path = (f"{IBERT}." if name.startswith(f"{ROBERTA}.") else "") + match.expand(place)
        low, high = state[f"{path}.x_min"], state[f"{path}.x_max"]
        largest = torch.maximum(low.abs(), high.abs()).max()
        if not largest.isfinite() or largest < UNSET:
            raise CheckpointError(
                f"{path}: x_min and x_max are {low.item():.3g} and {high.item():.3g}; its range was never set. I-BERT finds ranges while "
                "it is trained: run it in training mode with quant_mode, or calibrate its floating-point model, "
                "QuantSim(as_roberta(model), 'ibert')"
            )
        yield -largest, largest
