"""Beginning and end: a graph for inference that shares nothing it could change, and one that holds only what it uses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import count

import torch
from torch import Tensor, fx, nn

from quantsim.graph.roles import resolve
from quantsim.kernels.edges import COMPUTES
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.quantizers.fake_quantizer import FakeQuantizer, State

aten = torch.ops.aten


class LoweringError(ValueError):
    """A simulation that cannot be lowered as it is; the message says what to do first."""


def copy_for_inference(graph: fx.GraphModule, names: Mapping[str, str]) -> fx.GraphModule:
    """The graph on the same modules and parameters, without dropout.

    Args:
        names: node's name → edge that it computes; the copy has it in ``meta["computes"]``.
    """
    _refuse_other_floats(graph)
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


def _refuse_other_floats(graph: fx.GraphModule) -> None:
    for node in graph.graph.find_nodes(op="get_attr"):
        x = resolve(graph, str(node.target))
        if isinstance(x, nn.Parameter) and x.is_floating_point() and x.dtype is not torch.float32:
            raise LoweringError(
                f"{node.target}: {x.dtype}; expected torch.float32, in which what is between the integers is computed. Give QuantSim "
                "model.float(), and calibrate that"
            )


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing reads, and detach what is left from training.

    Views become reshapes: kernels lay values out in memory otherwise than the ops that they replace.
    """
    for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _hold_only_what_is_read(graph)
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


def _hold_only_what_is_read(graph: fx.GraphModule) -> None:
    """Parameters that no node reads go; the others become buffers under their names, copied: training goes on in the simulation."""
    root, memo = nn.Module(), dict[int, object]()
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            put(root, str(node.target), _own(resolve(graph, str(node.target)), memo))
    for name in [*dict(graph.named_children()), *graph._parameters, *graph._buffers]:
        delattr(graph, name)
    for name, child in root.named_children():
        graph.add_module(name, child)
    for name, buffer in root._buffers.items():
        graph.register_buffer(name, buffer)


def _own(value: object, memo: dict[int, object]) -> object:
    """A copy that the simulation doesn't share, with its range fixed where it is a quantizer; products were made for this graph."""
    if isinstance(value, Int8Linear):
        return value
    copied: object = copy.deepcopy(value, memo)
    if isinstance(copied, FakeQuantizer) and copied.spec.follow != "dynamic":
        copied.state = State.FIXED
    return copied


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads it, if no other does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


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


def put_beside(root: nn.Module, path: str, module: nn.Module) -> str:
    """:func:`put` a module at the path, or beside those that have it (``path_1``, ``path_2``, …); returns where it is."""
    *parents, name = path.split(".")
    taken: nn.Module | None = root
    for parent in parents:
        taken = taken._modules.get(parent) if taken is not None else None
    names = taken._modules if taken is not None else {}
    free = next(f for i in count() if (f := f"{name}_{i}" if i else name) not in names)
    put(root, path := ".".join([*parents, free]), module)
    return path
