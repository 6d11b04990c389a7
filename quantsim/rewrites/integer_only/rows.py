"""Chains of integer ops between products → programs over rows, which one kernel runs in one pass: equal to them, always."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from quantsim.graph.roles import KEEPS_GRID, op_of, resolve
from quantsim.kernels.edges import COMPUTES, look_up
from quantsim.kernels.int8_matmul import affine_matmul, int8_matmul
from quantsim.kernels.integer_rows import TYPES, IntegerRows, Op, Step
from quantsim.kernels.product_rows import ProductRows, missing_for_product_rows
from quantsim.numerics.dyadic import rescale, rescale_channels
from quantsim.numerics.polynomial import (
    ERF_BITS,
    ERFC_AT_0,
    EXP_NUMBERS,
    EXP_OF_0,
    GELU_BITS,
    TANH_BITS,
    i_gelu,
    i_normalize,
    i_softmax,
    i_tanh,
)
from quantsim.rewrites.lower_int8.weights import ROOM

aten = torch.ops.aten
WHERE = {aten.where.ScalarOther: 1, aten.where.ScalarSelf: 2}  # and where their tensor is
ATEN_ONE = frozenset({aten.to.dtype, aten.sub.Tensor, aten.neg.default, aten.clamp.default})
ONE = ATEN_ONE | {rescale, rescale_channels, i_gelu, i_tanh, i_normalize, i_softmax}  # steps of one operand
OF_A_ROW = frozenset({i_normalize, i_softmax})
GIVES_INT32 = frozenset({int8_matmul, affine_matmul, i_gelu, i_tanh, i_normalize, i_softmax})


def in_rows(graph: fx.GraphModule) -> fx.GraphModule:
    """A new graph with the same values, in which each such chain is one module, with the product before it where the CPU has AMX tiles.

    Tensors are shared, and the given graph stays as it is.
    """
    fused = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    done: set[fx.Node] = set()
    for node in reversed(list(fused.graph.nodes)):
        if node in done or not _fits(node, fused):
            continue
        program = _Program(fused)
        program.add(node)
        done |= program.inside
        if len(program.inside) == 1 and node.target is aten.to.dtype:
            continue
        path = f"{ROOM}.rows.{node.name}"
        module, arguments = _module(program, _known(_gives(node, fused)))
        fused.add_submodule(path, module)
        with fused.graph.inserting_before(node):
            new = fused.graph.call_module(path, arguments)
        new.meta = {COMPUTES: node.meta.get(COMPUTES, node.name)}
        node.replace_all_uses_with(new)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    fused.recompile()
    return fused


def _module(program: _Program, dtype: torch.dtype) -> tuple[IntegerRows, tuple[fx.Node, ...]]:
    """The program and what it is called on; the first product that it alone reads is in it, where the CPU has a kernel for that."""
    if not missing_for_product_rows():
        for place, x in enumerate(program.operands):
            if x.target is int8_matmul and len(x.users) == 1 and program.pushes(place) == 1:
                a, b, kernel = x.args
                others = program.operands[:place] + program.operands[place + 1 :]
                module = ProductRows(program.steps, program.constants, dtype, place, bool(kernel))
                return module, (a, b, *others)  # type: ignore[arg-type]
    return IntegerRows(program.steps, program.constants, dtype), tuple(program.operands)


class _Program:
    """The steps that end in a node: the ops before it that it alone reads are inside, what they read are operands."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.operands: list[fx.Node] = []
        self.constants: list[Tensor] = []
        self.inside: set[fx.Node] = set()

    def add(self, node: fx.Node) -> None:
        self.inside.add(node)
        if node.target in WHERE:
            at = WHERE[node.target]
            self._push(node.args[0])
            self._operand(node.args[at], node)
            self.steps.append(Step(Op.WHERE, (node.args[3 - at], int(at == 2))))  # type: ignore[arg-type]
        elif node.target is aten.add.Tensor:
            self._operand(node.args[0], node)
            self._operand(node.args[1], node)
            self.steps.append(Step(Op.ADD))
        else:
            self._operand(node.args[0], node)
            self.steps += self._step(node)

    def pushes(self, place: int) -> int:
        """How often an operand is read."""
        return sum(step.op is Op.PUSH and step.numbers[0] == place for step in self.steps)

    def _operand(self, x: object, reader: fx.Node) -> None:
        assert isinstance(x, fx.Node)
        narrow = _gives(x, self.graph) != torch.int32 and reader.target is not aten.to.dtype
        apart = len(x.users) > 1 or narrow or (x.target in OF_A_ROW and reader.target is aten.add.Tensor)
        if apart or not _fits(x, self.graph):
            self._push(x)
        else:
            self.add(x)

    def _push(self, x: object) -> None:
        assert isinstance(x, fx.Node)
        if x not in self.operands:
            self.operands.append(x)
        self.steps.append(Step(Op.PUSH, (self.operands.index(x),)))

    def _step(self, node: fx.Node) -> list[Step]:
        args, kwargs = node.args[1:], node.kwargs
        if node.target is aten.to.dtype:
            return []  # every row of the stack is int32
        if node.target is rescale:
            return [Step(Op.RESCALE, (*map(int, args[:5]), int(kwargs.get("zero_point", 0))))]  # type: ignore[arg-type]
        if node.target is rescale_channels:
            places = len(self.constants), len(self.constants) + 1
            self.constants += [_tensor(x, self.graph) for x in args[:2]]
            return [Step(Op.CHANNELS, tuple(args[2:5]), places)]  # type: ignore[arg-type]
        if node.target is i_gelu:
            return [Step(Op.GELU, (GELU_BITS, ERF_BITS, ERFC_AT_0))]
        if node.target is i_tanh:
            return [Step(Op.TANH, (*EXP_NUMBERS, EXP_OF_0, TANH_BITS))]
        if node.target is i_normalize:
            return [Step(Op.NORMALIZE, (*args, 42 - args[0]))]  # type: ignore[arg-type, operator]
        if node.target is i_softmax:
            return [Step(Op.SOFTMAX, (*EXP_NUMBERS, *map(int, args[:4])))]  # type: ignore[arg-type]
        if node.target is aten.neg.default:
            return [Step(Op.NEG)]
        if node.target is aten.sub.Tensor:
            return [Step(Op.SUB, (args[0],))]  # type: ignore[arg-type]
        low, high = _ends(node)
        return [Step(Op.CLAMP, (low, high))]


def _fits(node: fx.Node, graph: fx.GraphModule) -> bool:
    """The node is a step, and what it reads are rows of a type that the kernel knows."""
    if node.op != "call_function":
        return False
    if node.target in WHERE:
        at = WHERE[node.target]
        other = node.args[3 - at]
        return isinstance(other, int) and _gives(node.args[at], graph) == torch.int32
    if node.target is aten.add.Tensor:
        return len(node.args) == 2 and not node.kwargs and all(_gives(x, graph) == torch.int32 for x in node.args)
    if node.target not in ONE:
        return False
    given = _gives(node.args[0], graph)
    if node.target is aten.to.dtype:
        return given in TYPES and node.args[1:] == (torch.int32,)
    if node.target is i_softmax and (len(node.args) > 5 and node.args[5] != -1):
        return False
    if node.target is aten.sub.Tensor and not isinstance(node.args[1], int):
        return False
    return given == torch.int32


def _gives(x: object, graph: fx.GraphModule) -> torch.dtype | None:
    """The type of what a node gives, where it is known."""
    if not isinstance(x, fx.Node):
        return None
    target, args = x.target, x.args
    if x.op == "get_attr":
        return _tensor(x, graph).dtype
    if x.op == "call_module":
        module = graph.get_submodule(str(target))
        return module.dtype if isinstance(module, IntegerRows) else None
    if target is rescale:
        return x.kwargs.get("dtype", torch.int32)  # type: ignore[return-value]
    if target is rescale_channels:
        return args[6] if len(args) > 6 else torch.int32  # type: ignore[return-value]
    if target in GIVES_INT32:
        return torch.int32
    if target is aten.to.dtype:
        return args[1]  # type: ignore[return-value]
    if target is look_up:
        return _gives(args[1], graph)
    if target is aten.add.Tensor:
        given = {_gives(y, graph) for y in args}
        return given.pop() if len(given) == 1 else None
    if target in WHERE:
        return _gives(args[WHERE[target]], graph)
    if target in (aten.sub.Tensor, aten.neg.default, aten.clamp.default, aten.embedding.default) or op_of(x, graph) in KEEPS_GRID:
        return _gives(args[0], graph)
    return None


def _tensor(x: object, graph: fx.GraphModule) -> Tensor:
    assert isinstance(x, fx.Node)
    found = resolve(graph, str(x.target))
    assert isinstance(found, Tensor)
    return found


def _ends(node: fx.Node) -> tuple[int, int]:
    """Of ``clamp(x, min, max)``, whichever way they are given."""
    given = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
    low, high = given.get("min"), given.get("max")
    return (low if isinstance(low, int) else -(2**31), high if isinstance(high, int) else 2**31 - 1)


def _known(dtype: torch.dtype | None) -> torch.dtype:
    assert dtype is not None
    return dtype
