"""Which node is what: one table of ops, and the roles that follow from dataflow.

Nothing here knows an architecture. An op is named as ATen names it; what a node does in an attention is read from
the ops around it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from quantsim.graph.trace import module_path

SCORES, SCALE, MASK_ADD, MASK_FILL, PROBS, CONTEXT, HIDDEN, RESIDUAL = (
    "attention_scores",
    "attention_scale",
    "mask_add",
    "mask_fill",
    "attention_probs",
    "attention_context",
    "hidden_values",
    "residual",
)

HIDES = -1e4
"""A number that hides what it is added to, or put in place of: there is no use for it but in a softmax or an argmax."""


@dataclass(frozen=True)
class WeightArg:
    """Where an op takes its weight, which axis of it is the output channel, and where it takes its bias."""

    index: int
    axis: int = 0
    bias: int | None = None


WEIGHTS: dict[str, WeightArg] = {
    "linear": WeightArg(1, bias=2),  # x [*, in], weight [out, in]
    "addmm": WeightArg(2, axis=1, bias=0),  # bias, x [n, in], weight [in, out]
    "conv1d": WeightArg(1, bias=2),  # weight [out, in / groups, k]
    "conv2d": WeightArg(1, bias=2),
    "conv3d": WeightArg(1, bias=2),
    "embedding": WeightArg(0),  # weight [rows, width]
    "layer_norm": WeightArg(2, bias=3),  # weight [width]
    "group_norm": WeightArg(2, bias=3),
    "rms_norm": WeightArg(2),
    "batch_norm": WeightArg(1, bias=2),
}

NORMS = ("layer_norm", "rms_norm")
"""Norms over the last axis, each channel with a weight of its own."""

ALIASES = {"bmm": "matmul", "mm": "matmul", "_softmax": "softmax", "_safe_softmax": "softmax"}

PRODUCTS = ("matmul", "einsum")
"""Products of two computed tensors."""

KEEPS_GRID = frozenset(
    "adjoint alias as_strided broadcast_to chunk clone contiguous detach diagonal dropout expand expand_as flatten flip gather "
    "getitem index index_select lift_fresh_copy moveaxis movedim mT narrow numpy_T permute ravel repeat repeat_interleave reshape "
    "reshape_as roll select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split tile to transpose type_as unbind "
    "unflatten unfold unsafe_view unsqueeze view view_as".split()
)
"""Ops whose output holds values of their input and nothing else: the output is on the input's grid."""

SIZES_ALONE = frozenset("sym_size sym_numel sym_stride sym_storage_offset getattr empty_like full_like ones_like zeros_like".split())
"""Ops that read the shape, type or device of their input and none of its values."""

LIKE_ANOTHER = frozenset("expand_as reshape_as to type_as view_as".split())
"""Ops that read the values of their first input, and of another the shape or type alone."""

UNSCALE = "scales."
"""Where a graph keeps what ``quantsim.rewrites.scale_channels`` multiplies by again."""

Source = Literal["parameter", "float_input", "ids"]


def op_of(node: fx.Node, graph: fx.GraphModule) -> str:
    """The op's name: ATen's without namespace, overload and in-place underscore (``"add"``), a module's ``op``, or the kind of node."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return "dropout" if isinstance(module, nn.Dropout) else getattr(module, "op", "module")
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
        name = name.removesuffix("_")
        return ALIASES.get(name, name)
    return "getitem" if node.target is operator.getitem else getattr(node.target, "__name__", str(node.target))


def is_float(node: fx.Node) -> bool:
    """The node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def resolve(graph: fx.GraphModule, target: str) -> object:
    """The parameter, buffer or module at a dotted path."""
    value: object = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value


class Roles:
    """Names, ops, sources and attention roles of every node of a graph, worked out once.

    Attributes:
        op: node → op name.
        role: node → its role in an attention, where it has one; or that it hides values elsewhere, or is of the residual stream: what
            norms give, sums as wide as that, and what linears make for such a sum.
        name: node → a path that stays the same while module names do, for nodes that compute: the module's path and
            ``output`` where the module does one thing, else the path and the op (``"…attention.self.matmul_1"``).
        sources: node → what its value depends on.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        self.op = {node: op_of(node, graph) for node in self.nodes}
        self.sources = self._find_sources()
        self.role: dict[fx.Node, str] = {}
        for node in self.nodes:
            if self.op[node] == "softmax":
                self._find_attention(node)
        self.role |= {node: HIDDEN for node in self.nodes if node not in self.role and self._hides(node)}
        self.role = dict.fromkeys(self._find_residual(), RESIDUAL) | self.role
        self.name = self._find_names()

    # ---- what a node is ----

    def keeps_grid(self, node: fx.Node) -> bool:
        return self.op[node] in KEEPS_GRID

    def from_ids_alone(self, node: fx.Node) -> bool:
        """Masks, positions and constants: nothing learned and no value of a floating-point input goes in."""
        return not self.sources[node] & {"parameter", "float_input"}

    def weight_of(self, node: fx.Node) -> tuple[WeightArg, fx.Node] | None:
        """Where the node takes its weight and the node it takes it from; ``None`` if it has none."""
        at = WEIGHTS.get(self.op[node])
        if at is None or len(node.args) <= at.index or not isinstance(weight := node.args[at.index], fx.Node):
            return None
        return (at, weight) if "parameter" in self.sources[weight] else None

    def bias_of(self, node: fx.Node) -> fx.Node | None:
        """The bias that the node adds: an argument of the op, or a learned vector that a sum adds to something computed."""
        at = WEIGHTS.get(self.op[node])
        if at is None:
            return self._added_vector(node) if self.op[node] in ("add", "sub") else None
        if at.bias is None or len(node.args) <= at.bias:
            return None
        bias = node.args[at.bias]
        return bias if isinstance(bias, fx.Node) else None

    def _added_vector(self, node: fx.Node) -> fx.Node | None:
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
        learned = [(arg, parameter) for arg in operands if (parameter := self.parameter_of(arg))]
        if len(operands) != 2 or len(learned) != 1:
            return None
        arg, parameter = learned[0]
        return arg if sum(size != 1 for size in parameter.meta["val"].shape) <= 1 else None

    def parameter_of(self, node: fx.Node) -> fx.Node | None:
        """The one parameter whose values the node holds, and nothing else."""
        while node.op != "get_attr":
            if not (self.keeps_grid(node) and self.sources[node] == {"parameter"}):
                return None
            node = node.all_input_nodes[0]
        return node if "parameter" in self.sources[node] else None

    def unscales(self, node: fx.Node) -> bool:
        """The node multiplies by the scales of a stream (``quantsim.rewrites.scale_channels``)."""
        scale = node.args[1] if self.op[node] == "mul" else None
        return isinstance(scale, fx.Node) and scale.op == "get_attr" and str(scale.target).startswith(UNSCALE)

    def mask_operand(self, node: fx.Node) -> int | None:
        """Which argument of a mask add is the mask (of ``scores - mask``, the second)."""
        for i, arg in enumerate(node.args[:2]):
            if isinstance(arg, fx.Node) and is_float(arg) and self.from_ids_alone(arg):
                return i if self.op[node] == "add" or i == 1 else None
        return None

    # ---- working it out ----

    def _find_sources(self) -> dict[fx.Node, frozenset[Source]]:
        sources: dict[fx.Node, frozenset[Source]] = {}
        for node in self.nodes:
            found: frozenset[Source] = frozenset()
            if node.op == "placeholder":
                found = frozenset({"float_input" if is_float(node) else "ids"})
            elif node.op == "get_attr" and isinstance(value := resolve(self.graph, str(node.target)), nn.Parameter):
                found = frozenset({"parameter"} if value.is_floating_point() else ())
            reads = [] if self.op[node] in SIZES_ALONE else node.all_input_nodes[: 1 if self.op[node] in LIKE_ANOTHER else None]
            sources[node] = found.union(*(sources[n] for n in reads))
        return sources

    def _find_attention(self, softmax: fx.Node) -> None:
        """Walk from a softmax up to the product that made its scores, and down to the product that uses its weights."""
        found: dict[fx.Node, str] = {}
        product: fx.Node | None = None
        todo = list(softmax.all_input_nodes)
        while todo:
            node = todo.pop()
            if self.from_ids_alone(node) or node in found:
                continue
            op = self.op[node]
            if op in PRODUCTS:
                product = node
                found[node] = SCORES
            elif op in ("mul", "div") and sum(not self.from_ids_alone(n) for n in node.all_input_nodes) == 1:
                found[node] = SCALE
                todo += node.all_input_nodes
            elif op in ("add", "sub"):
                if self.mask_operand(node) is not None:
                    found[node] = MASK_ADD
                todo += node.all_input_nodes
            elif op in ("masked_fill", "where"):
                found[node] = MASK_FILL
                todo += node.all_input_nodes
            elif op in KEEPS_GRID:
                todo += node.all_input_nodes
        if product is None:
            return  # a softmax over something else than an attention's scores
        self.role |= found
        self.role[softmax] = PROBS
        for user in self._users_past(softmax, KEEPS_GRID | {"masked_fill"}):
            if self.op[user] in PRODUCTS:
                self.role[user] = CONTEXT

    def _hides(self, node: fx.Node) -> bool:
        """Outside an attention, the node adds a mask to computed values or overwrites some of them (the logits of hidden tokens)."""
        if not is_float(node) or self.from_ids_alone(node):
            return False
        if self.op[node] in ("add", "sub"):
            index = self.mask_operand(node)
            return index is not None and self._holds_a_large_number(node.args[index])
        return self.op[node] in ("masked_fill", "where") and any(self._holds_a_large_number(arg) for arg in node.args[1:])

    def _find_residual(self) -> Iterator[fx.Node]:
        norms = [node for node in self.nodes if self.op[node] in NORMS]
        widths = {_width(node) for node in norms} - {None}
        yield from norms
        for node in self.nodes:
            operands = [arg for arg in node.args if isinstance(arg, fx.Node) and is_float(arg) and not self.from_ids_alone(arg)]
            if self.op[node] != "add" or len(operands) != 2 or self.bias_of(node) or _width(node) not in widths:
                continue
            yield node
            for operand in operands:
                while self.op[operand] == "dropout":
                    operand = operand.all_input_nodes[0]
                if self.op[operand] == "linear":
                    yield operand

    def _holds_a_large_number(self, value: object) -> bool:
        """A number that hides is the value, or went into it."""
        seen: set[fx.Node] = set()
        todo = [value]
        while todo:
            x = todo.pop()
            if isinstance(x, float | int) and abs(x) >= -HIDES and not isinstance(x, bool):
                return isinstance(x, float)
            if isinstance(x, fx.Node) and x not in seen and is_float(x) and self.from_ids_alone(x):
                seen.add(x)
                todo += [*x.args]
        return False

    def _users_past(self, node: fx.Node, ops: frozenset[str]) -> Iterator[fx.Node]:
        for user in node.users:
            if self.op[user] in ops:
                yield from self._users_past(user, ops)
            else:
                yield user

    def sole_user(self, node: fx.Node) -> fx.Node | None:
        """The one node that uses this one's values, past those that keep its grid; ``None`` if there are several."""
        users = list(self._users_past(node, KEEPS_GRID))
        return users[0] if len(users) == 1 else None

    def is_read_by(self, node: fx.Node, ops: Sequence[str]) -> bool:
        """One of these ops uses the node's values, past those that keep its grid."""
        return any(self.op[user] in ops for user in self._users_past(node, KEEPS_GRID))

    def _computes(self, node: fx.Node) -> bool:
        return node.op == "call_function" or (node.op == "call_module" and self.op[node] not in ("module", "dropout"))

    def _find_names(self) -> dict[fx.Node, str]:
        computing = [n for n in self.nodes if self._computes(n) and is_float(n) and not self.keeps_grid(n)]
        unscaling = [n for n in computing if self.unscales(n)]
        computing = [n for n in computing if n not in unscaling]
        paths = {module_path(n).split(".parametrizations")[0] for n in self.nodes if n.op in ("call_function", "call_module")}
        parents = {path.rsplit(".", i)[0] for path in paths for i in range(1, path.count(".") + 1)} | {""}
        calls: dict[tuple[str, str], int] = {}
        for node in computing:
            calls[_call(node)] = calls.get(_call(node), 0) + 1
        names: dict[fx.Node, str] = {}
        taken = dict.fromkeys(paths | parents, 0)  # a quantizer's name is a path: it can't be that of a module which holds others
        for node in computing:
            path = module_path(node)
            alone = path not in parents and calls[_call(node)] == 1
            name = ".".join(filter(None, (path, "output" if alone else self.op[node])))
            taken[name] = taken.get(name, -1) + 1
            names[node] = name if taken[name] == 0 else f"{name}_{taken[name]}"
        for node in unscaling:
            scale = node.args[1]
            assert isinstance(scale, fx.Node)
            name = str(scale.target).rpartition(".")[0]
            taken[name] = taken.get(name, -1) + 1
            names[node] = name if taken[name] == 0 else f"{name}_{taken[name]}"
        return names


def _width(node: fx.Node) -> int | None:
    """The size of the last axis, if it is fixed."""
    value = node.meta.get("val")
    width = value.shape[-1] if isinstance(value, Tensor) and value.ndim else None
    return width if isinstance(width, int) else None


def _call(node: fx.Node) -> tuple[str, str]:
    """The module call that made the node: torch.export numbers the calls of a module that is called twice."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    return (stack[-1][0], stack[-1][1][0]) if stack else ("", "")
