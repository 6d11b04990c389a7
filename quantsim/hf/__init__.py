"""quantsim among the quantization methods of ``transformers``: importing this registers ``quant_method: "quantsim"``."""

from quantsim.hf.config import QuantSimConfig
from quantsim.hf.quantizer import QuantSimQuantizer, simulation_of

__all__ = ["QuantSimConfig", "QuantSimQuantizer", "simulation_of"]
