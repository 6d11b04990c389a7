"""A model whose forward runs its graph: what it takes and gives stays what the model takes and gives, loss included."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, fx, nn
from transformers.utils.generic import ModelOutput, find_labels

from quantsim.graph.example_inputs import at_least_two_rows
from quantsim.graph.proof import TraceError
from quantsim.graph.trace import eager_attention, export, returning_dict


class GraphForward:
    """Takes the place of ``model.forward``.

    Args:
        model: whose forward it becomes; its own forward is used once more, to trace the loss when labels first come.
        graph: the traced (and rewritten) graph.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self.model = model
        self.graph = graph
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        self.rooms = tuple(name for name, _ in graph.named_children() if name not in dict(model.named_children()))
        self.losses: dict[tuple[str, ...], fx.GraphModule | None] = {}
        self.labels = tuple(find_labels(type(model)))  # type: ignore[no-untyped-call]
        self.inputs = tuple(str(node.target) for node in graph.graph.find_nodes(op="placeholder"))
        self.required = tuple(str(node.target) for node in graph.graph.find_nodes(op="placeholder") if not node.args)
        own = inspect.signature(type(model).forward)
        named = [p for p in list(own.parameters.values())[1:] if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self.__signature__ = own.replace(parameters=named)  # **kwargs would ask Trainer for num_items_in_batch, which no graph takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        returns_dict = given.pop("return_dict", None)
        labels = {name: x for name in self.labels if (x := given.pop(name, None)) is not None}
        inputs = {name: x for name, x in given.items() if x is not None and x is not False}
        self._check(inputs)
        output = self.graph(**inputs)
        if labels:
            output = self._with_loss(output, inputs, labels)
        if returns_dict is None:
            returns_dict = getattr(getattr(self.model, "config", None), "return_dict", True)
        return output if returns_dict or not isinstance(output, ModelOutput) else output.to_tuple()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce__(self) -> NoReturn:
        refuse_pickle(self.model)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), self.dtype)
        if torch.promote_types(dtype, self.dtype) != dtype:
            raise TypeError(
                f"{type(self.model).__name__}: is in {dtype} now and was traced in {self.dtype}, which its graph still makes. Convert the "
                f"model before: QuantSim(model.to({dtype})); or run this one under torch.autocast"
            )
        for name in inputs:
            if name not in self.inputs:
                raise TypeError(
                    f"{type(self.model).__name__}: the graph takes {', '.join(self.inputs)}, not {name!r}. It was traced without it: "
                    f"give QuantSim example_inputs that hold {name!r} (output_* flags: set them in the model's config before)"
                )
        for name in self.required:
            if name not in inputs:
                raise TypeError(f"{type(self.model).__name__}: input {name!r} is missing; it takes {', '.join(self.inputs)}")

    def _with_loss(self, output: Any, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Any:
        key = tuple(sorted((f"{name}:{x.dtype}" for name, x in labels.items())))
        if key not in self.losses:
            self.losses[key] = trace_loss(self.model, inputs, labels)
        loss = self.losses[key]
        if loss is None:
            return output
        values = {**inputs, **labels, **output}
        needed = [str(node.target) for node in loss.graph.find_nodes(op="placeholder")]
        return type(output)(loss=loss(**{name: values[name] for name in needed}), **output)


def refuse_pickle(model: nn.Module) -> NoReturn:
    raise TypeError(
        f"{type(model).__name__}: a model that runs on a traced graph can't be pickled; write it with save_pretrained and read it with "
        "from_pretrained, or torch.save its state_dict"
    )


def run_on_graph(model: nn.Module, graph: fx.GraphModule) -> None:
    """Make ``graph`` the forward of ``model``, and the modules that only the graph has (quantizers, dropouts) the model's."""
    forward = GraphForward(model, graph)
    for name in forward.rooms:
        model.add_module(name, graph.get_submodule(name))
    model.forward = forward


def run_on_itself(model: nn.Module) -> None:
    """Undo :func:`run_on_graph`: the model computes by its own forward again, without the graph's modules."""
    forward = model.__dict__.pop("forward")
    for name in forward.rooms:
        delattr(model, name)


def trace_loss(model: nn.Module, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> fx.GraphModule | None:
    """The model's own loss as a graph of its outputs, its inputs and the labels; ``None`` where it gives none with these labels.

    Raises:
        TraceError: the loss needs more than these (a parameter, or a hidden state that is not an output).
    """
    batch = at_least_two_rows({name: x[:2].detach() for name, x in {**inputs, **labels}.items()})
    with _own_forward(model), eager_attention(model), returning_dict(model):
        try:
            full, _ = export(model, batch, training=False)
        except TraceError:  # a model that chooses its loss by the values of the labels
            with _stated_problem_type(model, labels):
                full, _ = export(model, batch, training=False)
    result = full.graph.output_node().args[0]
    if not isinstance(result, fx.Node) or "loss" not in result.kwargs:
        return None
    for node in result.all_input_nodes:
        if (tensor := _before_broadcast(node)) is not None:
            node.replace_all_uses_with(tensor)
    outputs = {node: name for name, node in result.kwargs.items() if name != "loss" and isinstance(node, fx.Node)}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copied:
            name = outputs.get(node, str(node.target) if node.op == "placeholder" else None)
            if name is None and node.op in ("get_attr", "call_module"):
                raise TraceError(f"{type(model).__name__}: its loss uses {node.target}, which is not an output of the model")
            if name is None:
                for source in node.all_input_nodes:
                    copy(source)
            copied[node] = graph.node_copy(node, copied.__getitem__) if name is None else _placeholder(graph, name)
        return copied[node]

    loss = result.kwargs["loss"]
    assert isinstance(loss, fx.Node)
    graph.output(copy(loss))
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, "Loss")


def _before_broadcast(node: fx.Node) -> fx.Node | None:
    """The tensor that the node is an alias of, where a loss broadcast it: export names an output by its last alias."""
    if node.target is not operator.getitem:
        return None
    broadcast, index = node.args
    if not isinstance(broadcast, fx.Node) or broadcast.target is not torch.ops.aten.broadcast_tensors.default:
        return None
    return broadcast.args[0][index]  # type: ignore[index, return-value]


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    first = next(iter(graph.nodes), None)
    with graph.inserting_before(first) if first is not None else graph.inserting_after():
        return graph.placeholder(name)


@contextmanager
def _stated_problem_type(model: Any, labels: Mapping[str, Tensor]) -> Iterator[None]:
    """``config.problem_type``, where it is left open, as transformers works it out from labels (``ForSequenceClassificationLoss``)."""
    config, given = getattr(model, "config", None), labels.get("labels")
    if config is None or given is None or getattr(config, "problem_type", "") is not None:
        yield
        return
    whole = not given.is_floating_point()
    several = "single_label_classification" if whole else "multi_label_classification"
    config.problem_type = "regression" if config.num_labels == 1 else several
    try:
        yield
    finally:
        config.problem_type = None


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    replaced = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            model.__dict__["forward"] = replaced
