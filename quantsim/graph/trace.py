"""Hugging Face model → one trainable ``torch.fx`` graph of core ATen ops, proven equal to the model.

``torch.export`` sees through any Python in a model's forward. What it bakes in is made live again here: dropout
follows ``train()`` and ``eval()``, optional inputs may be left out, and no device is fixed.
"""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers.utils.generic import ModelOutput

from quantsim.graph.aliases import out_of_place
from quantsim.graph.constants import keep_constants
from quantsim.graph.example_inputs import Batch, example_inputs, other_shape, without_axes_of_one
from quantsim.graph.proof import TraceError, first_difference, outputs_of, prove, prove_past_bounds
from quantsim.graph.regions import open_regions

aten = torch.ops.aten


def trace(model: nn.Module, example: Batch | None = None) -> fx.GraphModule:
    """Trace a model into a graph that is equal to it, bit for bit.

    The graph takes the example's inputs by keyword, with any batch size and sequence length, and returns the model's
    own output type. It shares the model's modules: to train the graph is to train the model. Attention is traced
    in its eager form, whichever the model was loaded with; inputs the model can do without may be left out.

    A model whose training forward cannot be traced (it keeps statistics, it drops layers at random) is traced as it
    evaluates, with a warning: dropout layers stay live, what else it does in training alone is left out.

    Args:
        model: any ``transformers`` encoder, with or without a head.
        example: a batch of tensors by keyword; made from ``model.config`` by default.

    Raises:
        TraceError: ``torch.export`` cannot follow the model (the message names the line of the model's code), or on a batch of
            another shape (also one past each bound that the trace puts on a size) the graph's output differs from the model's;
            the message shows both.
    """
    batch = without_axes_of_one(example_inputs(model) if example is None else example)
    with eager_attention(model), returning_dict(model):
        try:
            graph = _proven_graph(model, batch, training=True)
        except TraceError as error:
            graph = _proven_graph(model, batch, training=False)
            warnings.warn(
                f"{type(model).__name__} is traced as it evaluates: its dropout layers stay live, what else it does in training alone "
                f"(stochastic depth, running statistics, dropout of attention called as a function) is left out, because {error}",
                stacklevel=2,
            )
    own = set(model.modules())
    for module in graph.modules():
        if module not in own:  # the model's own dropouts are as they were
            module.training = model.training
    return graph


def _proven_graph(model: nn.Module, batch: Batch, training: bool) -> fx.GraphModule:
    graph, ranges = export(model, batch, training)
    out_of_place(graph)
    _make_dropout_live(graph, model)
    _free_device(graph)
    with _mode(model, training=False):
        _make_inputs_optional(graph, model, batch)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        graph.eval()
        prove(graph, model, batch)
        prove(graph, model, other_shape(batch))
        prove_past_bounds(graph, model, batch, ranges)
    return graph


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose forward made the node, as ``model.named_modules()`` spells it; "" at the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return ".".join(part.split("@")[0] for part in path.split(".")) if not path.startswith("_empty") else ""


# ---- the model, while it is traced ----


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Fused attention kernels hide the scores, which have quantizers of their own."""
    if not hasattr(model, "set_attn_implementation"):
        yield
        return
    before = model.config._attn_implementation  # transformers has a public setter and no public getter
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def returning_dict(model: nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    if config is None or config.return_dict:
        yield
        return
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = False


# ---- export, and what it bakes in ----


def export(model: nn.Module, batch: Batch, training: bool) -> tuple[fx.GraphModule, Mapping[Any, Any]]:
    """The model as a plain graph with keyword inputs, and the range of sizes for which export's choices hold.

    Args:
        training: export the training forward: in eval mode, dropout that is called as a function has no rate any more.
    """
    shapes = {name: dict.fromkeys(range(x.ndim), Dim.AUTO) for name, x in batch.items()}
    try:
        with _mode(model, training), _quiet():
            exported = torch.export.export(model, (), kwargs=dict(batch), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        where = f"{type(model).__name__}: torch.export cannot follow its forward with inputs {list(batch)}{_met(error)}"
        raise TraceError(f"{where}: {_first_paragraph(error)}") from error
    flat = exported.module(check_guards=False)
    graph = flat.graph
    output = graph.output_node()
    leaves: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    skeleton = pytree.tree_unflatten(list(range(len(leaves))), exported.call_spec.out_spec)
    with graph.inserting_before(output):
        output.args = (_rebuild(skeleton, leaves, graph),)
    graph.set_codegen(fx.graph.CodeGen())  # plain keyword inputs in place of export's pytrees
    traced = fx.GraphModule(flat, graph, type(model).__name__)
    open_regions(traced)
    keep_constants(traced, model)
    for name, child in model.named_children():
        if name in dict(traced.named_children()):
            traced.add_module(name, child)  # the model's own modules: what is moved or replaced there, the graph sees
    return traced, exported.range_constraints


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the graph that torch prints where it cannot go on: the error says what is to be said."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _first_paragraph(error: Exception) -> str:
    return str(error).strip().split("\n\n")[0]


def _met(error: Exception) -> str:
    """Where in the model's code the error came up: its innermost line outside torch."""
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if not frame.filename.startswith((torch_folder, "<"))]
    return f", at {Path(own[-1].filename).name}:{own[-1].lineno}, ``{own[-1].line}``" if own else ""


def _rebuild(skeleton: Any, leaves: list[Any], graph: fx.Graph) -> Any:
    """The model's output structure, with a graph node at each leaf."""
    if isinstance(skeleton, ModelOutput):
        return graph.call_function(type(skeleton), (), {name: _rebuild(x, leaves, graph) for name, x in skeleton.items()})
    if isinstance(skeleton, Mapping):
        return {name: _rebuild(x, leaves, graph) for name, x in skeleton.items()}
    if isinstance(skeleton, (tuple, list)):
        return type(skeleton)(_rebuild(x, leaves, graph) for x in skeleton)
    return leaves[skeleton] if isinstance(skeleton, int) else skeleton


def _make_dropout_live(graph: fx.GraphModule, model: nn.Module) -> None:
    """``aten.dropout(x, p, True)`` → the model's own ``nn.Dropout``, or a new one where the model called the function."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.dropout.default):
        x, p = node.args[0], node.args[1]
        path = module_path(node)
        dropout = model.get_submodule(path)
        if not isinstance(dropout, nn.Dropout):
            path, dropout = f"dropouts.{path}.{node.name}".replace("..", "."), nn.Dropout(p)
        graph.add_submodule(path, dropout)
        with graph.graph.inserting_before(node):
            live = graph.graph.call_module(path, (x,))
        live.meta = dict(node.meta)
        node.replace_all_uses_with(live)
        graph.graph.erase_node(node)


def _free_device(graph: fx.GraphModule) -> None:
    """Make new tensors on the device of the first input, and drop conversions to the device of the trace."""
    first = next(iter(graph.graph.find_nodes(op="placeholder")))
    device: fx.Node | None = None
    for node in list(graph.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.target in (aten.to.device, aten.to.dtype_layout):
            dtype = node.args[2] if node.target is aten.to.device else node.kwargs["dtype"]
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], dtype), {}
        elif "device" in node.kwargs:
            if device is None:
                with graph.graph.inserting_after(first):
                    device = graph.graph.call_function(getattr, (first, "device"))
            node.kwargs = node.kwargs | {"device": device}


def or_filled(value: Tensor | None, like: Tensor, fill: int, more: Sequence[int] = ()) -> Tensor:
    """``value``, or where it is ``None`` a tensor of ``like``'s shape (and ``more`` axes) filled with ``fill``."""
    return like.new_full((*like.shape, *more), fill) if value is None else value


def whole_numbers(x: Tensor | None, name: str) -> Tensor | None:
    """``x``, if it holds integers or booleans."""
    if x is not None and x.is_floating_point():
        raise TypeError(f"{name}: {x.dtype}; an integer graph takes integers (ids and masks): {name}.long()")
    return x


def _make_inputs_optional(graph: fx.GraphModule, model: nn.Module, batch: Batch) -> None:
    """Give a default to each input that the model can do without: ones or zeros, whichever equals leaving it out.

    Raises nothing: an input without such a default stays required.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    first, last = placeholders[0], placeholders[-1]
    for node in placeholders[1:]:
        fill = _default_of(node.target, model, batch)
        common, more = batch[node.target].shape[: batch[first.target].ndim], batch[node.target].shape[batch[first.target].ndim :]
        if fill is None or common != batch[first.target].shape:
            first.append(node)  # what is required comes before what is not
            continue
        node.args = (None,)
        with graph.graph.inserting_after(last):
            filled = graph.graph.call_function(or_filled, (node, first, fill, tuple(more)))
        filled.meta = {"val": node.meta.get("val")}
        node.replace_all_uses_with(filled, delete_user_cb=lambda user, filled=filled: user is not filled)
        last = filled


def _default_of(name: str, model: nn.Module, batch: Batch) -> int | None:
    x = batch[name]
    if x.is_floating_point():
        return None
    try:
        without = outputs_of(model, {key: value for key, value in batch.items() if key != name})
    except Exception:  # whatever the model raises where the input is required
        return None
    for fill in (1, 0):
        try:
            filled = outputs_of(model, {**batch, name: torch.full_like(x, fill)})
        except Exception:  # whatever it raises where 1 is no id of it: a model of one token type has 0 alone
            continue
        if first_difference(without, filled) is None:
            return fill
    return None
