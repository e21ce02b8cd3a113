"""The executable specification of DeepSeek-V3 in NumPy, forward and backward, with golden vectors."""

from refimpl import training
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.config.training import TrainingConfig
from refimpl.errors import Error, Invalid, Missing, Unreadable, Unsupported
from refimpl.model import Model, Result, load

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Choices",
    "Error",
    "Invalid",
    "Missing",
    "Model",
    "ModelConfig",
    "Result",
    "TrainingConfig",
    "Unreadable",
    "Unsupported",
    "__version__",
    "load",
    "preset",
    "training",
]
