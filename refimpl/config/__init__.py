"""What describes a model, a run, and the freedom between sources.  SPEC CONF, CHOICE."""

from refimpl.config.choices import CHOICES, PROFILES, Choice, Choices
from refimpl.config.model import ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.config.rope import YarnScaling
from refimpl.config.training import TrainingConfig

__all__ = [
    "CHOICES",
    "PRESETS",
    "PROFILES",
    "Choice",
    "Choices",
    "ModelConfig",
    "TrainingConfig",
    "YarnScaling",
    "preset",
]
