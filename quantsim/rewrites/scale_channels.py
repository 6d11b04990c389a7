"""Outliers out of activations: each channel behind a norm is divided by a number of its own, folded into the weights around it.

A *stream* is what can be scaled without changing what the model computes. It begins at a norm with a weight, and goes on where values
are added to it that a linear makes::

    x  = norm(…)         x / s: its weight and bias are divided by s
    y  = linear(x)       reads it: column j of its weight is multiplied by s_j, y is what it was
    x' = x + linear(…)   joins it: rows of the linear's weight, and its bias, are divided by s
    norm(x')             cannot take s in: reads x' * s

So where a norm feeds linears alone (ViT, ModernBERT) all is folded and no op is added (Xiao et al., SmoothQuant, 2023, section 4).
Where it feeds the residual sum too (BERT), the sum is scaled with it, and one product by ``s`` stays before the next norm: as Wei et
al. (Outlier Suppression, 2022) have it before the sum, but here the sum, where the outliers are, is quantized without them. Real
arithmetic is the same; in floating point results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from quantsim.config import ConfigError
from quantsim.graph.roles import NORMS, UNSCALE, WEIGHTS, Roles, resolve
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer
from quantsim.quantizers.in_graph import own_parameter

aten = torch.ops.aten
NORM, NORM_BIAS = WEIGHTS["layer_norm"], 3  # rms_norm has its weight at the same place, and no bias


@dataclass(frozen=True)
class Stream:
    """What is scaled together: ``C`` channels along the last axis.

    Attributes:
        name: of the norm's edge.
        norm: where it begins.
        joining: linears whose outputs are added to it.
        reading: linears that read it.
        edges: the scaled values that ops compute, ``[…, C]`` each.
        unscaled: value → the nodes that read ``value * s``.
    """

    name: str
    norm: fx.Node
    joining: tuple[fx.Node, ...]
    reading: tuple[fx.Node, ...]
    edges: tuple[fx.Node, ...]
    unscaled: Mapping[fx.Node, Sequence[fx.Node]]


def find_streams(graph: fx.GraphModule, roles: Roles | None = None) -> list[Stream]:
    """Every stream that a linear reads or joins, in the order of the graph; with quantizers in it or without.

    Left out is what is not its own: weights that are computed, or used in another place too.
    """
    search = _Search(graph, roles or Roles(graph))
    streams = [stream for node in graph.graph.nodes if search.roles.op[node] in NORMS and (stream := search.stream(node))]
    return [stream for stream in streams if stream.reading or stream.joining]


def unscale_reads(graph: fx.GraphModule) -> fx.GraphModule:
    """Put the products by ``s`` where streams need them, all of them 1 at first; in place, and returned.

    A stream's scales are the buffer ``scales.<name>.scale``.

    Raises:
        ConfigError: the graph has no stream.
    """
    streams = find_streams(graph)
    if not streams:
        raise ConfigError(
            "post_training.smooth: nothing to scale. No norm feeds a linear, or joins one in a sum, where their weights are parameters "
            "used in one place (a weight that is computed, as in low-rank training, takes no scales: merge it first)"
        )
    for stream in streams:
        if not stream.unscaled:
            continue
        holder = nn.Module()
        weight = _parameter(graph, stream.norm, NORM.index)
        holder.register_buffer("scale", torch.ones_like(weight, requires_grad=False))
        path = f"{UNSCALE}{stream.name}"
        graph.add_submodule(path, holder)
        for value, readers in stream.unscaled.items():
            with graph.graph.inserting_after(value):
                scale = graph.graph.get_attr(f"{path}.scale")
            with graph.graph.inserting_after(scale):
                product = graph.graph.call_function(aten.mul.Tensor, (value, scale))
            scale.meta = {"val": weight.detach()}
            product.meta = dict(value.meta)
            for reader in readers:
                reader.replace_input_with(value, product)
    graph.graph.lint()
    graph.recompile()
    return graph


@torch.no_grad()
def fold(graph: fx.GraphModule, stream: Stream, scale: Tensor) -> None:
    """Divide a stream's channels by ``scale`` ``[C]``, above 0, beside what they were divided by before; weights change in place."""
    for index in (NORM.index, NORM_BIAS):
        if (x := _parameter_or_none(graph, stream.norm, index)) is not None:
            x.div_(scale)
    for node in stream.joining:
        _parameter(graph, node, 1).div_(scale[:, None])  # [C, in]
        if (bias := _parameter_or_none(graph, node, 2)) is not None:
            bias.div_(scale)
    for node in stream.reading:
        _parameter(graph, node, 1).mul_(scale)  # [out, C]
    if stream.unscaled:
        resolve(graph, f"{UNSCALE}{stream.name}.scale").mul_(scale)  # type: ignore[attr-defined]


def unfold(graph: fx.GraphModule) -> None:
    """Give the weights back what they were divided by, of streams that keep a product: without these products they are the model then."""
    for stream in find_streams(graph):
        if stream.unscaled and UNSCALE.rstrip(".") in dict(graph.named_children()):
            scale: Tensor = resolve(graph, f"{UNSCALE}{stream.name}.scale")  # type: ignore[assignment]
            fold(graph, stream, 1 / scale)  # powers of two: exact


def read_columns(graph: fx.GraphModule, stream: Stream) -> Tensor:
    """The largest magnitude in each column of the weights that read the stream, ``[C]``; ones where none does."""
    weights: list[Tensor] = [_parameter(graph, node, 1) for node in stream.reading]
    if not weights:
        return torch.ones_like(_parameter(graph, stream.norm, NORM.index))
    return torch.cat(weights).abs().amax(0)


def _parameter(graph: fx.GraphModule, node: fx.Node, index: int) -> nn.Parameter:
    found = _parameter_or_none(graph, node, index)
    assert found is not None
    return found


def _parameter_or_none(graph: fx.GraphModule, node: fx.Node, index: int) -> nn.Parameter | None:
    """The parameter that the node takes as this argument, if it alone does."""
    return own_parameter(node.args[index], graph) if len(node.args) > index else None


class _Search:
    """Follows what a norm gives."""

    def __init__(self, graph: fx.GraphModule, roles: Roles) -> None:
        self.graph, self.roles = graph, roles

    def stream(self, norm: fx.Node) -> Stream | None:
        if not self._owned(norm, NORM.index, NORM_BIAS):
            return None
        joining, reading, edges = list[fx.Node](), list[fx.Node](), [norm]
        scaled, unscaled = dict.fromkeys([norm]), dict[fx.Node, list[fx.Node]]()
        todo = [norm]
        while todo:
            value = todo.pop(0)
            for user in value.users:
                if self._passes(user):
                    todo.append(user)
                    scaled[user] = None
                elif self._reads(user, value):
                    reading.append(user)
                elif (way := self._joins(user, value)) is not None:
                    joining.append(way[-1])
                    edges += [way[-1], user]
                    scaled |= dict.fromkeys([*way, user])
                    todo.append(user)
                elif self.roles.unscales(user):
                    unscaled.setdefault(value, []).extend(user.users)
                elif user not in scaled:
                    unscaled.setdefault(value, []).append(user)
        return Stream(self.roles.name[norm], norm, tuple(joining), tuple(reading), tuple(edges), unscaled)

    def _owned(self, node: fx.Node, weight: int, bias: int | None = None) -> bool:
        """The node's weight is a parameter that it alone takes, and so is its bias, if it has one."""
        has_bias = bias is not None and len(node.args) > bias and isinstance(node.args[bias], fx.Node)
        taken = [weight, bias] if bias is not None and has_bias else [weight]
        return all(_parameter_or_none(self.graph, node, index) is not None for index in taken)

    def _passes(self, node: fx.Node) -> bool:
        """Dropout, and an edge's quantizer."""
        if node.op != "call_module":
            return False
        module = self.graph.get_submodule(str(node.target))
        return isinstance(module, (nn.Dropout, FakeQuantizer)) and not isinstance(module, WeightQuantizer)

    def _reads(self, node: fx.Node, value: fx.Node) -> bool:
        return self.roles.op[node] == "linear" and node.args[0] is value and self._owned(node, 1)

    def _joins(self, node: fx.Node, value: fx.Node) -> list[fx.Node] | None:
        """Where the node adds to ``value`` what a linear makes for it alone: from that operand back to the linear."""
        if self.roles.op[node] != "add" or node.kwargs or len(node.args) != 2:
            return None
        operand = node.args[1] if node.args[0] is value else node.args[0]
        way = list(self._back(operand)) if isinstance(operand, fx.Node) and operand is not value else []
        if not way or self.roles.op[way[-1]] != "linear" or not self._owned(way[-1], 1, 2):
            return None
        alone = all(len(n.users) == 1 for n in way)
        same = way[-1].meta["val"].shape[-1] == value.meta["val"].shape[-1] == node.meta["val"].shape[-1]
        return way if alone and same else None

    def _back(self, node: fx.Node) -> Iterator[fx.Node]:
        yield node
        while self._passes(node):
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
            yield node
