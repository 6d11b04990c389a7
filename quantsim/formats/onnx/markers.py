"""Markers: nodes of a domain of ours that stand in the graph until what the file shall hold takes their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, EDGE, PLACEMENT = "quantsim", "Edge", "placement"


def source(marker: ir.Node) -> ir.Value:
    """What the marker reads."""
    x = marker.inputs[0]
    assert x is not None
    return x


def replace(marker: ir.Node, value: ir.Value) -> None:
    """Everything that reads the marker reads ``value``; an output of the model keeps its name."""
    import onnx_ir as ir

    out = marker.outputs[0]
    if out.is_graph_output():
        name = out.name
        out.name = f"{name}.marker"
        value.name = name
    ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)
    assert marker.graph is not None
    marker.graph.remove(marker, safe=True)
