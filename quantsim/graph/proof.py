"""The proof that a graph computes what its model computes: both are run, on the example, on another shape, and past every bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantsim.graph.example_inputs import Batch

LARGEST = 4096  # sizes past a bound are tried up to here: attention grows with their square


class TraceError(RuntimeError):
    """The model could not be traced, or its graph does not compute what the model computes."""


@torch.no_grad()
def outputs_of(model: Callable[..., Any], batch: Batch) -> list[Tensor]:
    """Every tensor that the model gives, in order."""
    return [leaf for leaf in pytree.tree_leaves(model(**batch)) if isinstance(leaf, Tensor)]


def first_difference(expected: list[Tensor], actual: list[Tensor]) -> int | None:
    """The number of the first output that is not equal, bit for bit."""
    if len(expected) != len(actual):
        return min(len(expected), len(actual))
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.shape != b.shape or not torch.equal(a, b):
            return i
    return None


def prove(graph: fx.GraphModule, model: nn.Module, batch: Batch) -> None:
    """Run both on a batch that the model takes.

    Raises:
        TraceError: one of them fails, the model's output is not finite, or the outputs differ; the message shows both.
    """
    shapes = {name: list(x.shape) for name, x in batch.items()}
    name = type(model).__name__
    try:
        expected = outputs_of(model, batch)
    except Exception as error:
        raise TraceError(f"{name}: the model itself fails on inputs {shapes}: {error}") from error
    if any(not x.isfinite().all() for x in expected if x.is_floating_point()):
        raise TraceError(f"{name}: its own output is not finite on inputs {shapes}; check its weights for NaN and infinity")
    try:
        actual = outputs_of(graph, batch)
    except Exception as error:
        raise TraceError(f"{name}: the traced graph fails on inputs {shapes}{_fixed_sizes(graph, batch)}: {error}") from error
    if (i := first_difference(expected, actual)) is not None:
        a, b = (str(outputs[i]) if i < len(outputs) else "nothing" for outputs in (expected, actual))
        raise TraceError(
            f"{name}: on inputs {shapes} output {i} of the graph differs from the model's.\nmodel: {a}\ngraph: {b}\n"
            "A branch on the values or the size of an input, or state that the forward changes, cannot be traced"
        )


def _is_fixed(size: int | torch.SymInt) -> bool:
    """The trace holds for this size alone: a plain number, or a symbol that export has found to be one."""
    return isinstance(size, int) or size.node.expr.is_number


def _fixed_sizes(graph: fx.GraphModule, batch: Batch) -> str:
    """Which sizes of the batch the trace has fixed at others."""
    fixed = [
        f"axis {axis} of {node.target} at {size}"
        for node in graph.graph.find_nodes(op="placeholder")
        for axis, size in enumerate(node.meta["val"].shape)
        if _is_fixed(size) and size != batch[str(node.target)].shape[axis]
    ]
    return f", for the model's code fixes {' and '.join(fixed)}" if fixed else ""


def prove_past_bounds(graph: fx.GraphModule, model: nn.Module, batch: Batch, ranges: Mapping[Any, Any]) -> None:
    """Run both one past each size that the trace takes for granted, where the model runs there.

    A table of 512 positions bounds a length too, and the model refuses 513 itself; a model that does not refuse has
    another branch there, which the graph lacks.

    Args:
        ranges: size symbol → its range, as ``ExportedProgram.range_constraints``.
    """
    for other in past_bounds(graph, batch, ranges):
        try:
            outputs_of(model, other)
        except Exception:  # whatever the model raises on sizes that it does not take
            continue
        prove(graph, model, other)


def past_bounds(graph: fx.GraphModule, batch: Batch, ranges: Mapping[Any, Any]) -> Iterator[dict[str, Tensor]]:
    """The batch with one size changed, for each end of each range."""
    symbols = {
        (str(node.target), axis): size.node.expr
        for node in graph.graph.find_nodes(op="placeholder")
        for axis, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    for symbol in dict.fromkeys(symbols.values()):
        known = ranges.get(symbol)
        if known is None:
            continue
        axes = {name: [axis for axis in range(x.ndim) if symbols.get((name, axis)) == symbol] for name, x in batch.items()}
        for size in (known.lower - 1, known.upper + 1):
            if 1 < size <= LARGEST:  # export takes 0 and 1 to be special, which is no branch of the model's
                yield {name: _resized(x, axes[name], int(size)) for name, x in batch.items()}


def _resized(x: Tensor, axes: list[int], size: int) -> Tensor:
    """``x`` cut or repeated to ``size`` along ``axes``."""
    for axis in axes:
        index = torch.arange(size, device=x.device) % x.shape[axis]
        x = x.index_select(axis, index)
    return x
