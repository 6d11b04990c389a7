"""Weights and biases adjusted to calibration data, layer by layer: the floating-point model and the quantized one walk side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from quantsim.config import ConfigError
from quantsim.graph.roles import WEIGHTS, Roles
from quantsim.post_training.adaround import learn_rounding
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import own_parameter, quantizer_of
from quantsim.report.walk import Batch, Walk, evaluating, everyone, nobody

CHANNELS_LAST = frozenset({"linear", "addmm", "layer_norm"})
"""Ops whose bias is along the last axis of what they give."""


@torch.no_grad()
def adjust_layers(graph: fx.GraphModule, batches: Sequence[Batch], *, rounding_steps: int = 0, biases: bool = False) -> None:
    """Adjust each layer to the inputs that the quantized model gives it once the layers before it are adjusted.

    All batches walk together, so data goes through the model once; what is held is what is alive, for all rows, twice.
    Positions that ``attention_mask`` pads say nothing. A parameter that is computed, or used in more than one place, stays as it is.

    Args:
        graph: simulated and calibrated; its weights and biases are changed in place.
        batches: inputs by keyword.
        rounding_steps: optimizer steps of ``adaround.learn_rounding`` for each linear's weight; 0 leaves weights as they are.
        biases: add to every bias the mean error of its op's output, ``E[y - y_hat]`` (Nagel et al., 2019, section 4.2, empirical form).

    Raises:
        ConfigError: there is no weight to round, or no bias to correct.
    """
    layers = _Layers(graph)
    layers.check(rounding_steps > 0, biases)
    with evaluating(graph):
        exact = [Walk(graph, batch, nobody) for batch in batches]
        quantized = [Walk(graph, batch, everyone) for batch in batches]
        for node in layers.roles.nodes:
            weight = layers.rounded_weight(node) if rounding_steps else None
            seen = moments(_read(node, exact), _read(node, quantized), batches) if weight else None
            wanted = [walk.step()[1] for walk in exact]
            if weight and seen:
                rounded = weight.learn(*seen, rounding_steps)
                for walk in quantized:
                    walk.env[weight.node] = rounded
            found = [walk.step()[1] for walk in quantized]
            if biases and (bias := layers.bias(node)) is not None:
                correction = mean_error(wanted, found, batches).to(bias)
                bias.add_(correction)
                for value in found:
                    value.add_(correction)


def _read(linear: fx.Node, walks: Sequence[Walk]) -> list[Tensor]:
    return [walk.env[linear.args[0]] for walk in walks]  # type: ignore[index]


def mean_error(wanted: Sequence[Tensor], found: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """The mean of ``wanted - found`` over all positions that are not padded, in float64: ``[…, C] -> [C]``."""
    errors = [shown(y.double() - y_hat.double(), batch) for y, y_hat, batch in zip(wanted, found, batches, strict=True)]
    return torch.cat(errors).mean(0) if any(map(len, errors)) else errors[0].new_zeros(errors[0].shape[1:])


def shown(x: Tensor, batch: Batch) -> Tensor:
    """``[…, C] -> [positions, C]``, without those that ``attention_mask`` pads where ``x`` has its axes."""
    mask = batch.get("attention_mask")
    if mask is not None and x.ndim == mask.ndim + 1 and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.flatten(0, -2)


def moments(exact: Sequence[Tensor], quantized: Sequence[Tensor], batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """``E[x_hat' x_hat]`` and ``E[(x - x_hat)' x_hat]`` over all positions that are not padded, ``[in, in]``."""
    gram = drift = exact[0].new_zeros(())
    count = 0
    for x, x_hat, batch in zip(exact, quantized, batches, strict=True):
        rows, rows_hat = shown(x, batch), shown(x_hat, batch)  # [n, in]
        gram = gram + rows_hat.T @ rows_hat
        drift = drift + (rows - rows_hat).T @ rows_hat
        count += len(rows)
    return gram / max(count, 1), drift / max(count, 1)


class _Weight:
    """A linear's weight, its quantizer, and the node that gives it quantized."""

    def __init__(self, node: fx.Node, weight: nn.Parameter, quantizer: WeightQuantizer) -> None:
        self.node, self.weight, self.quantizer = node, weight, quantizer

    def learn(self, gram: Tensor, drift: Tensor, steps: int) -> Tensor:
        self.weight.copy_(learn_rounding(self.weight.detach(), self.quantizer.affine_params(), gram, drift, steps))
        return self.quantizer(self.weight)  # type: ignore[no-any-return]


class _Layers:
    """The parameters of a graph's layers, if they are theirs alone."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.roles = graph, Roles(graph)

    def check(self, rounding: bool, biases: bool) -> None:
        for asked, method, find in (
            (rounding, "adaround", self.rounded_weight),
            (biases, "bias_correction", self.bias),
        ):
            if asked and all(find(node) is None for node in self.roles.nodes):
                raise ConfigError(
                    f"post_training.{method}: nothing to adjust. It takes linears whose parameter is used in one place and not computed "
                    "(low-rank training computes weights: merge them first)"
                )

    def rounded_weight(self, node: fx.Node) -> _Weight | None:
        """Of a linear: its own weight, if that has a calibrated quantizer with a range for the tensor or for each row."""
        source = node.args[1] if self.roles.op[node] == "linear" else None
        quantizer, weight = quantizer_of(source, self.graph), own_parameter(source, self.graph)
        if not isinstance(quantizer, WeightQuantizer) or weight is None:
            return None
        assert isinstance(source, fx.Node)
        return _Weight(source, weight, quantizer) if quantizer.calibrated and quantizer.spec.axis in (None, 0) else None

    def bias(self, node: fx.Node) -> nn.Parameter | None:
        index = WEIGHTS[self.roles.op[node]].bias if self.roles.op[node] in CHANNELS_LAST else None
        return own_parameter(node.args[index], self.graph) if index is not None and len(node.args) > index else None
