"""quantsim: a BERT in 8 bits. Trace, place, insert, calibrate, train, save."""

from quantsim.config import ConfigError, QuantConfig, QuantSpec, Rule
from quantsim.formats.checkpoint import CheckpointError
from quantsim.graph.place import Placement, place
from quantsim.graph.proof import TraceError
from quantsim.graph.trace import trace
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, State
from quantsim.rewrites.clamp_mask import clamp_mask
from quantsim.rewrites.insert_quantizers import insert_quantizers
from quantsim.sim import QuantSim

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "FakeQuantizer",
    "Placement",
    "QuantConfig",
    "QuantSim",
    "QuantSpec",
    "Rule",
    "State",
    "TraceError",
    "clamp_mask",
    "insert_quantizers",
    "place",
    "trace",
]
