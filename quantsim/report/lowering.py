"""Which kernel computes each edge of a lowered graph, and why some are left in floating point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tabulate import tabulate
from torch import Tensor, fx

from quantsim.graph.roles import op_of
from quantsim.kernels.edges import COMPUTES, from_integers, look_up, on_grid, rows_from_integers, to_integers
from quantsim.kernels.int8_attention import Int8Attention, missing_for_attention
from quantsim.kernels.int8_linear import Int8Linear
from quantsim.kernels.int8_matmul import scaled_matmul
from quantsim.quantizers.fake_quantizer import FakeQuantizer
from quantsim.quantizers.following import DynamicIntegers

REASONS = {
    "matmul": "a side is no 8-bit edge",
    "linear": "what comes in is no 8-bit edge, or its weight is no symmetric 8-bit one",
    "softmax": "exponentials are computed in float32",
    "layer_norm": "mean and variance are computed in float32",
    "add": "both sides are on grids of their own",
}


class LoweredEdge(NamedTuple):
    """How one edge of the lowered graph is computed.

    Attributes:
        name: of the edge, or of the edges that one kernel computes.
        kernel: ``"int8 product"``, ``"int8 attention"``, ``"table"``, ``"int8 rows"``, ``"exact float32 matmul"``, or
            ``"float32 <op>"``.
        stored: the type that the next op reads: ``"uint8"``, ``"int8"``, ``"float32"``.
        note: what runs inside the kernel, or why it is none of integers.
    """

    name: str
    kernel: str
    stored: str
    note: str


def lowered_edges(graph: fx.GraphModule) -> list[LoweredEdge]:
    """Every edge that computes something, in the order of the graph."""
    return list(_edges(graph))


def lowering_table(graph: fx.GraphModule) -> str:
    """A line an edge, under the counts by kernel."""
    edges = lowered_edges(graph)
    counts = Counter(edge.kernel for edge in edges)
    lines = [", ".join(f"{count} {kernel}" for kernel, count in counts.most_common())]
    memory = stored_bytes(graph)
    lines.append(f"weights and constants: {memory / 1e6:.1f} MB")
    return "\n".join([*lines, "", tabulate(edges, headers=("edge", "kernel", "stored as", "note"), disable_numparse=True)])


def stored_bytes(graph: fx.GraphModule) -> int:
    """The bytes of all tensors that the graph holds."""
    seen: dict[int, int] = {}
    for module in graph.modules():
        for x in [*module._parameters.values(), *module._buffers.values()]:
            if isinstance(x, Tensor):
                seen[id(x) if x.is_mkldnn else x.data_ptr()] = x.numel() * x.element_size()
    return sum(seen.values())


def _edges(graph: fx.GraphModule) -> Iterator[LoweredEdge]:
    for node in graph.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Int8Linear):
            yield _product(node, module)
        elif isinstance(module, DynamicIntegers):
            yield LoweredEdge(
                module.name, "dynamic range", "int8" if module.spec.symmetric else "uint8", "found for each tensor as it comes"
            )
        elif isinstance(module, FakeQuantizer):
            yield LoweredEdge(module.name, "fake quantizer", "float32", f"{module.spec}: integers in storage are 8-bit and per tensor")
        elif isinstance(module, Int8Attention):
            stored = str(module.grids.context.dtype).removeprefix("torch.")
            yield LoweredEdge(node.meta[COMPUTES], "int8 attention", stored, "scores, mask, softmax and context in one kernel")
        elif node.target is scaled_matmul:
            yield LoweredEdge(
                node.meta[COMPUTES], "exact float32 matmul", _stored(node), missing_for_attention() or "no attention of 8 bits throughout"
            )
        elif node.target is look_up:
            yield LoweredEdge(node.meta[COMPUTES], "table", _stored(node), "256 entries at most")
        elif COMPUTES in node.meta and node.target not in (to_integers, from_integers, rows_from_integers, on_grid):
            op = op_of(node, graph)
            if op == "getitem":
                continue
            if op == "embedding":
                kernel, note = ("int8 rows", "dequantized as they are looked up") if _reads_integers(node) else ("float32 embedding", "")
                yield LoweredEdge(node.meta[COMPUTES], kernel, _stored(node), note)
            elif op == "scaled_dot_product_attention":
                yield LoweredEdge(node.meta[COMPUTES], f"float32 {op}", _stored(node), "scores, mask, softmax and context in one kernel")
            else:
                yield LoweredEdge(node.meta[COMPUTES], f"float32 {op}", _stored(node), REASONS.get(op, "no integer kernel"))


def _product(node: fx.Node, module: Int8Linear) -> LoweredEdge:
    pieces = [piece for split in node.users for piece in split.users] if len(module.outputs) > 1 else [node]
    names = [piece.meta[COMPUTES] for piece in pieces]
    notes: list[str] = ["of an edge with a range for each tensor"] if len(node.args) > 1 else []
    notes += [module.post_op] if module.post_op != "none" else []
    notes += ["requantized"] if module.requantizes else []
    notes += [] if module.packs else ["in float32: see the message of lower()"]
    grid = module.outputs[0].grid
    stored = "float32" if grid is None else str(grid.dtype).removeprefix("torch.")
    return LoweredEdge(" + ".join(names), "int8 product", stored, ", ".join(notes))


def _stored(node: fx.Node) -> str:
    """The type in which the node's values are read, past what moves them."""
    if node.target is look_up or _reads_integers(node):
        return "int8" if node.target is not look_up or node.args[2] != 0 else "uint8"
    for user in node.users:
        if user.target is to_integers:
            return "int8" if user.args[3] < 0 else "uint8"  # type: ignore[operator]
    return "float32, on its grid" if any(user.target is on_grid for user in node.users) else "float32"


def _reads_integers(node: fx.Node) -> bool:
    """The node looks up rows of integers."""
    table = node.args[0] if node.op == "call_function" and node.args else None
    reads = (from_integers, rows_from_integers)
    return isinstance(table, fx.Node) and table.op == "get_attr" and any(user.target in reads for user in node.users)
