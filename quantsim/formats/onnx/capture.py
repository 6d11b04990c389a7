"""A simulated graph → an ONNX graph with a marker node on every edge that has a quantizer.

``torch.onnx`` translates the operators. A marker, ``quantsim::Edge``, is an operator that no optimization knows and so none
removes or moves; ``quantsim.formats.onnx.qdq`` puts what the file shall hold in its place.
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers.utils.generic import ModelOutput

from quantsim.formats.onnx.edges import bias_at
from quantsim.formats.onnx.exact import exactly
from quantsim.formats.onnx.extra import OnnxError
from quantsim.formats.onnx.markers import DOMAIN, EDGE, PLACEMENT
from quantsim.graph.roles import op_of, resolve
from quantsim.graph.trace import or_filled
from quantsim.quantizers.exact_op import ExactOp
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

AXES = {2: ("batch", "sequence"), 3: ("batch", "choices", "sequence")}  # of ids and masks, by rank


def mark(x: Tensor, placement: str) -> Tensor:
    """The identity, as a node that says which edge it is."""
    marked: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{EDGE}", (x,), {PLACEMENT: placement}, dtype=x.dtype, shape=x.shape, version=1)
    return marked


# ---- the graph with marks ----


def marked_graph(
    graph: fx.GraphModule, weights: Mapping[WeightQuantizer, Tensor], biases: Mapping[fx.Node, str], exact: bool = False
) -> tuple[fx.GraphModule, list[str]]:
    """A copy that shares the parameters: marks in place of quantizers, no dropout, every input given, outputs in a flat tuple.

    Args:
        weights: the whole weight of each weight quantizer; a computed one becomes a constant.
        biases: node of ``graph`` that takes a bias to be marked → the bias's name.
        exact: write ops as ``quantsim.formats.onnx.exact`` has them.

    Returns:
        The copy, and the names of its outputs.
    """
    new, constants = fx.Graph(), dict[str, Any]()
    copies: dict[fx.Node, fx.Node] = {}
    names: list[str] = []
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.target is or_filled or isinstance(module, nn.Dropout):
            copies[node] = copies[node.args[0]]
        elif isinstance(module, FakeQuantizer):
            x = copies[node.args[0]]
            if isinstance(module, WeightQuantizer) and is_computed(node.args[0], graph):
                constants[f"computed.{module.name}"] = weights[module].detach()
                x = new.get_attr(f"computed.{module.name}")
            copies[node] = new.call_function(mark, (x, module.name))
        elif (
            exact
            and node not in biases
            and (made := exactly(new, node, graph, fx.map_arg(node.args, copies.__getitem__), constants)) is not None
        ):
            copies[node] = made
        elif isinstance(module, ExactOp):
            copies[node] = new.call_function(module.aten, *fx.map_arg((node.args, node.kwargs), copies.__getitem__))
        elif node.op == "output":
            outputs = dict(leaves(node.args[0]))
            names = list(outputs)
            new.output(tuple(copies[leaf] for leaf in outputs.values()))
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node].args = ()
        if node in biases:
            at = bias_at(op_of(node, graph))
            with new.inserting_before(copies[node]):
                marked_bias = new.call_function(mark, (copies[node].args[at], biases[node]))
            copies[node].update_arg(at, marked_bias)
    new.eliminate_dead_code()
    read = {str(node.target) for node in new.find_nodes(op="get_attr")} - set(constants)
    return fx.GraphModule(constants | {target: resolve(graph, target) for target in read}, new, "Marked").eval(), names


def is_computed(weight: fx.Node, graph: fx.GraphModule) -> bool:
    """The weight is the result of an op on parameters (``torch.nn.utils.parametrize``), not a parameter or rows of one."""
    return weight.op != "get_attr" and op_of(weight, graph) != "embedding"


def leaves(output: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor of a model's output, or the node that makes it, by name: ``logits``, ``hidden_states.0``; else ``output``."""
    if isinstance(output, fx.Node) and isinstance(output.target, type) and issubclass(output.target, ModelOutput):
        output = output.kwargs
    if isinstance(output, Mapping):
        items: Sequence[tuple[object, Any]] = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        if isinstance(output, (fx.Node, Tensor)):
            yield prefix or "output", output
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


# ---- torch.onnx ----


def to_ir(
    marked: fx.GraphModule,
    outputs: Sequence[str],
    opset: int,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> ir.Model:
    """Translate, with the dynamic axes of the trace by their usual names.

    Args:
        translations: op of torch → the function of ``onnxscript`` values that writes it, in place of torch.onnx's own. The graph is then
            left as it is translated: to simplify the thousands of small operators of an integer graph takes a second for every twenty.

    Raises:
        OnnxError: torch.onnx has no translation for what is in the graph.
    """
    batch = _example(marked)
    shapes = {name: dict.fromkeys(range(x.ndim), Dim.AUTO) for name, x in batch.items()}
    try:
        with quiet():
            exported = torch.export.export(marked, (), kwargs=batch, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                exported,
                input_names=list(batch),
                output_names=list(outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
                custom_translation_table=dict(translations or {}),
                optimize=translations is None,
            )
    except Exception as error:
        raise OnnxError(f"torch.onnx cannot translate this graph at opset {opset}: {error}") from error
    assert program is not None
    model = program.model
    if model.opset_imports[""] != opset:
        raise OnnxError(f"torch.onnx cannot write opset {opset} for this graph; it wrote {model.opset_imports['']}")
    _name_axes(model)
    return model


def _example(marked: fx.GraphModule) -> dict[str, Tensor]:
    """Zeros in the shapes that the graph was traced with: export looks at shapes and types alone."""
    device = next(itertools.chain(marked.parameters(), marked.buffers())).device
    batch = {}
    for node in marked.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        shape = [size.node.hint if isinstance(size, torch.SymInt) else size for size in like.shape]
        batch[str(node.target)] = torch.zeros(shape, dtype=like.dtype, device=device)
    return batch


def _name_axes(model: ir.Model) -> None:
    """Name each symbol after the first input's axis that has it: ``s18`` becomes ``batch``, wherever it stands."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for x in model.graph.inputs:
        assert x.shape is not None
        known = AXES.get(len(x.shape), ("batch",)) if x.dtype is not None and x.dtype.is_integer() else ("batch",)
        for axis, size in enumerate(x.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, known[axis] if axis < len(known) else f"axis_{axis}")
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: Mapping[str, str]) -> Any:
    return size if isinstance(size, int) or size.value is None else re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.value)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx warns that torchvision, which no encoder here needs, is not installed, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
