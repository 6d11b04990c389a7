"""Beginning and end: a graph for inference that shares nothing it could change, and one that holds only what it uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from quantsim.kernels.edges import COMPUTES
from quantsim.quantizers.fake_quantizer import FakeQuantizer

aten = torch.ops.aten


class LoweringError(ValueError):
    """A simulation that cannot be lowered as it is; the message says what to do first."""


def copy_for_inference(graph: fx.GraphModule, names: Mapping[str, str]) -> fx.GraphModule:
    """The graph on the same modules and parameters, without dropout.

    Args:
        names: node's name → edge that it computes; the copy has it in ``meta["computes"]``.
    """
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    new.output(new.graph_copy(graph.graph, copies))
    for node, copied in copies.items():
        if node.name in names:
            copied.meta = copied.meta | {COMPUTES: names[node.name]}
    lowered = fx.GraphModule(graph, new, f"Int8{type(graph).__name__}")
    for node in list(new.nodes):
        if node.op == "call_module" and isinstance(lowered.get_submodule(str(node.target)), nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            new.erase_node(node)
        elif node.op == "call_module":
            _refuse_uncalibrated(lowered.get_submodule(str(node.target)))
    return lowered


def _refuse_uncalibrated(module: nn.Module) -> None:
    if isinstance(module, FakeQuantizer) and not module.calibrated:
        raise LoweringError(
            f"{module.name}: its quantizer is {module.state.name.lower()}; call compute_encodings, or load ranges, before lower()"
        )


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing reads, and detach what is left from training."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _hold_only_what_is_read(graph)
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


def _hold_only_what_is_read(graph: fx.GraphModule) -> None:
    """Parameters that no node reads go; the others become buffers under their names."""
    root = nn.Module()
    for node in graph.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        value: object = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        put(root, str(node.target), value)
    for name in [*dict(graph.named_children()), *graph._parameters, *graph._buffers]:
        delattr(graph, name)
    for name, child in root.named_children():
        graph.add_module(name, child)
    for name, buffer in root._buffers.items():
        graph.register_buffer(name, buffer)


def put(root: nn.Module, path: str, value: object) -> None:
    """Put a module, or a tensor as a buffer, at a dotted path; modules on the way are made."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif name not in root._buffers:
        assert isinstance(value, Tensor)
        root.register_buffer(name, value.detach())
