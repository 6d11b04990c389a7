"""QDQ ONNX: a simulation as a file that integer runtimes read, and its comparison with the simulation."""

from quantsim.formats.onnx.extra import OnnxError
from quantsim.formats.onnx.parity import OnnxParity, compare_onnx
from quantsim.formats.onnx.write import export_onnx, read_metadata

__all__ = ["OnnxError", "OnnxParity", "compare_onnx", "export_onnx", "read_metadata"]
