"""An integer graph → an ONNX file of integer operators, which ONNX Runtime computes to the bit.

``torch.onnx`` translates what moves, adds and masks. The functions of ``quantsim.numerics`` go through it whole, as one operator that
nothing looks into, and are then written by being called (``quantsim.formats.onnx.written``). Products are MatMulInteger of UINT8 by
UINT8, for of UINT8 by INT8 they saturate on an x86 CPU without VNNI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from quantsim.config import QuantConfig
from quantsim.formats.onnx.capture import leaves, to_ir
from quantsim.formats.onnx.extra import NEEDED_TO_EXPORT, OnnxError, need
from quantsim.formats.onnx.write import METADATA, produced, save
from quantsim.formats.onnx.written import Written
from quantsim.graph.roles import resolve
from quantsim.graph.trace import or_filled, whole_numbers
from quantsim.kernels.edges import look_up
from quantsim.kernels.int8_matmul import int8_matmul
from quantsim.numerics.dyadic import rescale, rescale_channels
from quantsim.numerics.polynomial import i_gelu, i_normalize, i_softmax, i_tanh

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
CALLED: Mapping[str, Callable[..., Any]] = {
    f.__name__: f for f in (rescale, rescale_channels, i_gelu, i_normalize, i_softmax, i_tanh, look_up)
}
TYPES: Mapping[str, torch.dtype] = {str(dtype): dtype for dtype in (torch.int8, torch.uint8, torch.int32)}

aten = torch.ops.aten


def export_integers(path: str | Path, graph: fx.GraphModule, config: QuantConfig) -> None:
    """Write the graph of an :class:`quantsim.lowered.IntegerModel`; see its ``export_onnx``.

    Raises:
        OnnxError: ``path`` is a folder, or ``torch.onnx`` has no translation for an op of the graph.
        ImportError: ``onnx`` or ``onnxscript`` isn't installed.
    """
    need(*NEEDED_TO_EXPORT)
    path = Path(path)
    if path.is_dir():
        raise OnnxError(f"{path}: is a folder; expected the file to write")
    with torch.no_grad():
        model = to_ir(*_flat(graph), OPSET, translations())
    _tidy(model)
    produced(model)
    model.metadata_props[METADATA] = json.dumps({"integers": True, "config": config.to_dict()})
    save(path, model)


def _tidy(model: ir.Model) -> None:
    """What torch.onnx's own optimizer would do in minutes, of these thousands of small operators: the cheap half of it."""
    from onnx_ir.passes import common

    for tidied in (common.IdentityEliminationPass(), common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        tidied(model)


# ---- the graph that torch.onnx sees ----


def _flat(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy that takes every input, without checks, and gives its outputs in a flat tuple; and their names."""
    new, copies, names, weights = fx.Graph(), dict[fx.Node, fx.Node](), list[str](), dict[str, Tensor]()
    for node in graph.graph.nodes:
        args: tuple[Any, ...] = () if node.op == "placeholder" else fx.map_arg(node.args, copies.__getitem__)
        if node.target in (or_filled, whole_numbers):
            copies[node] = args[0]
        elif node.op == "output":
            outputs = dict(leaves(node.args[0]))
            names = list(outputs)
            new.output(tuple(copies[leaf] for leaf in outputs.values()))
        elif node.target is int8_matmul and (weight := _stored(node.args[1])) is not None:
            name = f"{weight.target}.unsigned"
            rows = resolve(graph, str(weight.target))
            assert isinstance(rows, Tensor)
            weights[name] = _unsigned(rows.t()).contiguous()
            copies[node] = new.call_function(times_weight, (args[0], new.get_attr(name)))
        elif node.op == "call_function" and node.target in CALLED.values():
            copies[node] = new.call_function(call, (node.target.__name__, *args), dict(node.kwargs))
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node].args = ()
    new.eliminate_dead_code()
    read = {str(node.target) for node in new.find_nodes(op="get_attr")} - set(weights)
    return fx.GraphModule(weights | {target: resolve(graph, target) for target in read}, new, "Integers").eval(), names


def _stored(b: Any) -> fx.Node | None:
    """The constant that a product multiplies by, if it does."""
    weight = b.args[0] if b.target is aten.t.default else None
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def times_weight(a: Tensor, weight: Tensor) -> Tensor:
    """``a @ (weight - 128)`` in int32, for a weight that is stored as UINT8 ``[in, out]``."""
    zero_points = (torch.tensor(0 if a.dtype == torch.uint8 else 128, dtype=torch.uint8), torch.tensor(128, dtype=torch.uint8))
    shape = (*a.shape[:-1], weight.shape[-1])
    product: Tensor = torch.onnx.ops.symbolic(
        "MatMulInteger", (_unsigned(a), weight, *zero_points), dtype=torch.int32, shape=shape, version=10
    )
    return product


def _unsigned(x: Tensor) -> Tensor:
    """INT8 as UINT8, every integer 128 higher."""
    return x if x.dtype == torch.uint8 else (x.int() + 128).to(torch.uint8)


# ---- functions, called on what writes itself ----


def call(function: str, *args: Any, **kwargs: Any) -> Tensor:
    """One of ``CALLED``, as one operator; tensors come before its other arguments."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    dtypes = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
    gives = tensors[1].dtype if function == look_up.__name__ else dtypes[0] if dtypes else torch.int32
    plain = json.dumps([[*args[len(tensors) :]], kwargs], default=str)  # a dtype as its name
    out: Tensor = torch.ops.quantsim.called(tensors, function, plain, gives)
    return out


@torch.library.custom_op("quantsim::called", mutates_args=())
def _called(tensors: Sequence[Tensor], function: str, arguments: str, gives: torch.dtype) -> Tensor:
    args, kwargs = _read(arguments)
    out: Tensor = CALLED[function](*tensors, *args, **kwargs)
    return out


@_called.register_fake
def _(tensors: Sequence[Tensor], function: str, arguments: str, gives: torch.dtype) -> Tensor:
    return torch.empty_like(tensors[0], dtype=gives)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator of torch → what writes it, for ``torch.onnx``."""
    return {torch.ops.quantsim.int8_matmul.default: _product, torch.ops.quantsim.called.default: _call}


def _call(tensors: Sequence[ir.Value], function: str, arguments: str, gives: int) -> ir.Value:
    args, kwargs = _read(arguments)
    written: Written = CALLED[function](*map(Written.of, tensors), *args, **kwargs)
    return written.value


def _read(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = json.loads(arguments)
    return [TYPES.get(x, x) for x in args], {name: TYPES.get(x, x) for name, x in kwargs.items()}


def _product(a: ir.Value, b: ir.Value, kernel: bool = False) -> ir.Value:
    """Of two edges."""
    sides = [Written.of(x) for x in (a, b)]
    left, right = (side if side.kind == "UINT8" else (side.int() + 128).to("UINT8") for side in sides)
    zero_points = [left.number(128 * (side.kind == "INT8")) for side in sides]
    return left.op.MatMulInteger(left.value, right.value, *zero_points)  # type: ignore[no-any-return]
