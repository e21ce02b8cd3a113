"""A model as a network in stages.  SPEC PIPE-51, PIPE-52.

Every microbatch is divided by the counts of the whole batch (LOSS-1, MTP-5, BALANCE-4), so that losses and
gradients of microbatches add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add as plus
from typing import Any

from refimpl.errors import Invalid
from refimpl.losses import Divisors, Terms, joined, parts, total
from refimpl.model import GradientMap, Model
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline.network import Done, Loss
from refimpl.pipeline.split import Split
from refimpl.prepared import Passed, Prepared, backward, forward, terms
from refimpl.units import Unit

COUNTED = ("input_ids", "labels", "targets", "mask", "segment_ids")  # what the divisors depend on
ARGUMENTS = (*COUNTED, "position_ids", "routing")


@dataclass(frozen=True)
class Saved:
    """What a stage keeps of a microbatch."""

    units: tuple[Passed, ...]


@dataclass(frozen=True)
class ModelStage:
    """Neighbouring units, and what they read of every microbatch."""

    units: tuple[Unit, ...]
    inputs: tuple[Prepared, ...]  # of all microbatches

    def forward(self, microbatch: int, x: Array | None) -> Done:
        """x (T, D)  ->  y (T, D)."""
        given, passed = self.inputs[microbatch], []
        for unit in self.units:
            x, _, one = forward(given, unit, x)
            passed.append(one)
        return Done(x, Saved(tuple(passed)), terms(self.units, passed, given.has_loss))

    def backward(self, microbatch: int, dy: Array | None, saved: Saved, grads: Gradients) -> Array | None:
        """dy (T, D)  ->  dx (T, D)."""
        for unit, one in zip(reversed(self.units), reversed(saved.units), strict=True):
            dy = backward(self.inputs[microbatch], unit, dy, one, grads)
        return dy


@dataclass(frozen=True)
class ModelStages:
    """The network."""

    model: Model
    inputs: tuple[Prepared, ...]
    divisors: Divisors  # of the whole batch
    stages: tuple[ModelStage, ...]

    @property
    def microbatches(self) -> int:
        return len(self.inputs)

    def gradients(self, deferred: bool = False) -> Gradients:
        """An empty collector: shared parameters add up under one name."""
        return self.model.gradients(deferred)

    def every(self, gradients: Mapping[str, Array]) -> GradientMap:
        """With zeros for what nothing reached."""
        return GradientMap(self.model.weights, self.model.ar, gradients)

    def loss(self, terms: Sequence[Sequence[Terms]]) -> Loss:
        """One sum over all that is given, divided once."""
        whole = joined([_united(of_stages) for of_stages in terms])
        found = parts(self.model.ar, whole, self.divisors)
        return Loss(total(found, self.model.training), found)


def staged(model: Model, batches: Sequence[Mapping[str, Any]], cut: Split) -> ModelStages:
    """A model with its microbatches, each the arguments of `Model.forward`.  Raises Invalid."""
    if not isinstance(batches, Sequence) or not batches or not all(isinstance(m, Mapping) for m in batches):
        raise Invalid("the batch has to be a sequence of at least one microbatch, each a mapping.")
    for number, one in enumerate(batches):
        unknown = [name for name in one if name not in ARGUMENTS]
        if unknown:
            raise Invalid(f"microbatch {number} has {unknown[0]!r}, but it may have {', '.join(ARGUMENTS)}.")
        if "input_ids" not in one:
            raise Invalid(f"microbatch {number} has no input_ids, but it needs them.")
        if one.get("labels") is None and one.get("targets") is None:
            raise Invalid(f"microbatch {number} has neither labels nor targets, but its loss needs them.")
    counts = [
        _of(number, model.divisors, {name: one[name] for name in COUNTED if name in one})
        for number, one in enumerate(batches)
    ]
    whole: Divisors = reduce(plus, counts)
    if not whole.targets[0]:
        raise Invalid("the number of targets is 0, but a loss needs one that is not -100 or padding.")
    inputs = tuple(
        _of(number, model.prepare, {**one, "divisors": whole, "microbatch": number})
        for number, one in enumerate(batches)
    )
    return ModelStages(model, inputs, whole, tuple(ModelStage(units, inputs) for units in cut))


def _of(number: int, call: Any, arguments: Mapping[str, Any]) -> Any:
    """The call, whose errors say which microbatch they are about."""
    try:
        return call(**arguments)
    except Invalid as error:
        raise Invalid(f"microbatch {number}: {error}") from None


def _united(of_stages: Sequence[Terms]) -> Terms:
    """One microbatch's terms, of its stages in their order."""
    nll = tuple(x for one in of_stages for x in one.nll)
    return Terms(nll, {key: x for one in of_stages for key, x in one.balance.items()})
