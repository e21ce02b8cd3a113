"""What a schedule runs: a network in stages, whatever they compute.  SPEC PIPE-51.

stages.py makes one of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


class Done(NamedTuple):
    """What a stage made of a microbatch."""

    y: Array | None  # for the next stage; nobody reads the last one's
    saved: Any  # for the way back: one object, which can be referred to weakly
    terms: Any = None  # what it adds to the loss


class Loss(NamedTuple):
    value: float
    parts: Mapping[str, float]  # unweighted, by name


class Stage(Protocol):
    """A run of units.  It holds nothing of a microbatch: what it made is with whoever called it."""

    def forward(self, microbatch: int, x: Array | None) -> Done:
        """x, None for the first stage  ->  y and the rest."""

    def backward(self, microbatch: int, dy: Array | None, saved: Any, grads: Gradients) -> Array | None:
        """dy, None for the last stage  ->  dx, None from the first; weight gradients go to `grads`, where
        those of linears wait."""


class Network(Protocol):
    """Stages, and what is common to all of them."""

    @property
    def stages(self) -> Sequence[Stage]: ...

    @property
    def microbatches(self) -> int: ...

    @property
    def inputs(self) -> Any:
        """What the stages read of the batch (ids, masks, targets): no activation, and not counted as one."""

    def gradients(self, deferred: bool = False) -> Gradients:
        """An empty collector."""

    def every(self, gradients: Mapping[str, Array]) -> Mapping[str, Array]:
        """Those of the parameters that something reached  ->  of all parameters."""

    def loss(self, terms: Sequence[Sequence[Any]]) -> Loss:
        """terms[microbatch][stage], of all microbatches  ->  the loss; of one of them  ->  its share."""
