"""Training: the optimiser, balancing, schedules, and the step that a port is checked against."""

from refimpl.training.files import export, load, save
from refimpl.training.initialise import initialise
from refimpl.training.state import State, start
from refimpl.training.stepping import Report, step

__all__ = ["Report", "State", "export", "initialise", "load", "save", "start", "step"]
