"""Training: the optimiser, balancing, schedules, and the step that a port is checked against."""

from refimpl.training.state import State, start
from refimpl.training.stepping import Report, step

__all__ = ["Report", "State", "start", "step"]
