"""QuantSim, by subject: what it is (``simulation``), how it is calibrated (``calibration``), the stages that follow (``stages``)."""

from quantsim.sim.simulation import Batch, Data, resolve_config
from quantsim.sim.stages import QuantSim

__all__ = ["Batch", "Data", "QuantSim", "resolve_config"]
