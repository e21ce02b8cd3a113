"""A microbatch, ready for the units; a unit's way forward and back with its loss.  SPEC MODEL-5, LOSS-1.

Whoever runs the units, all in one place or spread over the stages of a pipeline, runs them through here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refimpl.config.choices import Choices
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.layers import loss
from refimpl.layers.batch import Batch, Inputs, Tokens, allowed, positions
from refimpl.layers.context import Context, Ops
from refimpl.losses import Divisors, Terms, balancing, counted
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.units import Unit, unit_backward, unit_forward


@dataclass(frozen=True)
class Prepared:
    """What the units read besides hidden states; `Model.prepare` makes it."""

    context: Context
    tokens: tuple[Tokens, ...]  # one for each depth
    divided: Divisors
    mtp_weight: float  # of one module's loss

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.tokens[0].batch.size, self.tokens[0].batch.length

    @property
    def has_loss(self) -> bool:
        return self.tokens[0].targets is not None


@dataclass(frozen=True)
class Passed:
    """What a unit leaves for its way back."""

    saved: Any
    loss: loss.Saved | None = None  # of the head and the modules, where there are targets

    @property
    def block(self) -> Any:
        """What the decoder layer of a layer or a module saved."""
        return getattr(self.saved, "layer", self.saved)


def depths(given: Inputs, ops: Ops, choices: Choices, modules: int) -> list[Inputs]:
    """The inputs of the main model and of each MTP module."""
    found = [given]
    for _ in range(modules):
        found.append(ops.shifted(found[-1], choices))
    return found


def prepare(
    c: Context, given: Inputs, training: TrainingConfig | None, modules: int, divisors: Divisors | None
) -> Prepared:
    """Inputs that are checked  ->  what the units read.  Raises Invalid for divisors that fit nothing."""
    every = depths(given, c.ops, c.choices, modules)
    divided = _divided(every, c.choices, divisors)
    tokens = tuple(
        _tokens(c, x, every[0], training, n) for x, n in zip(every, divided.sequences, strict=True)
    )
    weight = training.mtp_loss_weight / modules if training is not None and modules else 0.0
    return Prepared(c, tokens, divided, weight)


def forward(given: Prepared, unit: Unit, x: Array | None) -> tuple[Array, Array | None, Passed]:
    """x (T, D), None for the embedding  ->  y (T, D), logits (T, V) of head and modules, what is left."""
    c, tokens = given.context, given.tokens[unit.depth]
    y, logits, saved = unit_forward(c, unit, x, tokens)
    if logits is None or tokens.targets is None:
        return y, logits, Passed(saved)
    count = max(given.divided.targets[unit.depth], 1)
    return y, logits, Passed(saved, c.ops.loss.forward(c, logits, tokens.targets, count)[1])


def backward(given: Prepared, unit: Unit, dy: Array | None, passed: Passed, grads: Gradients) -> Array | None:
    """dy (T, D), None when nothing reads the output  ->  dx (T, D), None from the embedding."""
    dlogits = _dlogits(given, unit, passed) if unit.has_logits else None
    tokens = given.tokens[unit.depth]
    return unit_backward(given.context, unit, dy, dlogits, passed.saved, tokens, grads)


def terms(units: Iterable[Unit], passed: Iterable[Passed], has_loss: bool) -> Terms:
    """What these units add to the losses."""
    nll: list[Array] = []
    balanced: dict[tuple[str, int, int], Array] = {}
    for unit, one in zip(units, passed, strict=True):
        if one.loss is not None:
            nll.append(one.loss.nll)
        if has_loss and unit.layer >= 0:
            own = getattr(getattr(one.block.mlp, "balanced", None), "losses", {})
            balanced |= {(kind, unit.layer, unit.depth): losses for kind, losses in own.items()}
    return Terms(tuple(nll), balanced)


def _tokens(
    c: Context, given: Inputs, main: Inputs, training: TrainingConfig | None, sequences: int
) -> Tokens:
    """What the units of one depth read, when its balance losses are means over so many sequences."""
    size, length = given.ids.shape
    batch = Batch(size, length, c.ops.tables(c, given.positions.reshape(-1)), allowed(given.segments))
    balanced = None
    if training is not None and c.config.n_routed_experts:
        balanced = balancing(given, c.choices, training, sequences)
    first = (positions(main.segments) == 0) & main.exists
    targets = None if given.targets is None else given.targets.reshape(-1)
    ids, exists = given.ids.reshape(-1), given.exists.reshape(-1)
    return Tokens(ids, first.reshape(-1), exists, batch, targets, balanced)


def _divided(every: list[Inputs], choices: Choices, given: Divisors | None) -> Divisors:
    """The divisors of the losses, checked."""
    own = counted(every, choices)
    if given is None:
        if every[0].targets is not None and own.targets[0] == 0:
            raise Invalid("the number of targets is 0, but a loss needs one that is not -100 or padding.")
        return own
    if not isinstance(given, Divisors):
        raise Invalid(f"divisors are {given!r}, but they have to be Divisors.")
    sequences = given.sequences or own.sequences
    if len(given.targets) != len(every) or len(sequences) != len(every):
        raise Invalid(
            f"divisors are {given}, but they have to have one entry for each of {len(every)} depths."
        )
    if given.targets[0] < 1:
        raise Invalid(f"divisors.targets begins with {given.targets[0]}, but at least 1 is required.")
    return Divisors(given.targets, sequences)


def _dlogits(given: Prepared, unit: Unit, passed: Passed) -> Array:
    c = given.context
    if passed.loss is None:
        return c.ar.zeros((len(given.tokens[unit.depth].ids), c.config.vocab_size))
    dlogits: Array = c.ops.loss.backward(c, given.mtp_weight if unit.depth else 1.0, passed.loss)
    return dlogits
