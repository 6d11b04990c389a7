"""quantsim: a BERT in 8 bits. Trace, place, insert, calibrate, train, save, lower."""

from quantsim.config import ConfigError, PostTraining, QuantConfig, QuantSpec, Rule
from quantsim.formats.aimet_encodings import EncodingsError
from quantsim.formats.checkpoint import CheckpointError
from quantsim.formats.onnx import OnnxError
from quantsim.graph.place import Placement, place
from quantsim.graph.proof import TraceError
from quantsim.graph.trace import trace
from quantsim.integer_training import IntegerTraining
from quantsim.lowered import IntegerModel, LoweredModel
from quantsim.numerics.fixed_point import FixedPointError
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, State
from quantsim.report.analysis import ReportError
from quantsim.report.integers import find_floats
from quantsim.report.parity import Parity, compare_lowered
from quantsim.rewrites.clamp_mask import clamp_mask
from quantsim.rewrites.insert_quantizers import insert_quantizers
from quantsim.rewrites.integer_only import IntegerError, integer_only
from quantsim.rewrites.integer_training import IntegerConfig
from quantsim.rewrites.lower_int8 import LoweringError, lower_int8
from quantsim.sim import QuantSim

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "EncodingsError",
    "FakeQuantizer",
    "FixedPointError",
    "IntegerConfig",
    "IntegerError",
    "IntegerModel",
    "IntegerTraining",
    "LoweredModel",
    "LoweringError",
    "OnnxError",
    "Parity",
    "Placement",
    "PostTraining",
    "QuantConfig",
    "QuantSim",
    "QuantSpec",
    "ReportError",
    "Rule",
    "State",
    "TraceError",
    "clamp_mask",
    "compare_lowered",
    "find_floats",
    "insert_quantizers",
    "integer_only",
    "lower_int8",
    "place",
    "trace",
]
