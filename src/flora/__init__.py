"""FLoRA: parameter-efficient fine-tuning for weights of any number of dimensions, as a PEFT method.

Importing ``flora`` registers the method with PEFT; ``FloraConfig`` then works wherever PEFT takes a config.
"""

from flora.delta import TuckerDelta
from flora.initialize import INITIALIZERS
from flora.layers import LAYERS
from flora.planning import Plan, plan
from flora.tucker import Tucker
from flora.tuner import register

register()

from flora.tuner.config import FloraConfig  # noqa: E402  (needs the registered type)

__all__ = ["INITIALIZERS", "LAYERS", "FloraConfig", "Plan", "Tucker", "TuckerDelta", "plan"]
__version__ = "0.1.0"
