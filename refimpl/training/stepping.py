"""One training step.  SPEC STEP-2 to STEP-5.

In this order: divisors of the whole batch; each microbatch forward and backward into one collection of
gradients; their norm and clipping; AdamW; the selection biases, from the counts of this step's routing; the
average; the counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add as plus
from typing import Any

import numpy as np

from refimpl.checkpoint.names import BIAS
from refimpl.errors import Invalid
from refimpl.losses import Divisors, joined, parts, total
from refimpl.model import GradientMap, Model
from refimpl.numerics.arithmetic import Array
from refimpl.training import loads
from refimpl.training.state import State

Microbatch = Mapping[str, Any]  # arguments of Model.forward: input_ids, labels or targets, mask, routing, ...
Counts = Sequence[Mapping[int, Array]]  # of each microbatch: layer -> (B, N) int
PIECE = 1 << 15  # elements of a parameter that are updated at once
_COUNTED = ("input_ids", "labels", "targets", "mask", "segment_ids")


@dataclass(frozen=True)
class Report:
    """What a step did.  losses: the unweighted parts; loads: layer -> (N,) tokens of each expert."""

    step: int
    tokens: int  # of this step
    loss: float
    losses: Mapping[str, float]
    learning_rate: float
    gradient_norm: float  # before clipping
    clip: float
    loads: loads.Loads

    @property
    def max_violation(self) -> Mapping[int, float]:
        """layer -> MaxVio."""
        return {layer: loads.max_violation(load) for layer, load in self.loads.items()}


@dataclass(frozen=True)
class Collected:
    """What the microbatches of a batch gave, before anything is updated."""

    gradients: Mapping[str, Array]  # of every parameter
    losses: Mapping[str, float]
    counts: Counts
    gates: Sequence[Mapping[int, tuple[Array, Array, Array]]]  # of each microbatch, see Result.gates
    tokens: int


@np.errstate(all="ignore")  # what is not finite is found and named
def step(state: State, batch: Sequence[Microbatch]) -> tuple[State, Report]:
    """The state after one step on a batch: its microbatches, of all data ranks, in a stated order.

    Raises: Invalid for bad input, and for a loss or gradient that is not finite, naming the first tensor.
    """
    training, rules = state.model.training, state.rules
    assert training is not None  # the state gave it
    seen = collect(state, batch)
    norm = rules.norm(state.ar, seen.gradients.values())
    if not np.isfinite(norm):
        name = next(n for n, g in seen.gradients.items() if not np.isfinite(g).all())
        raise Invalid(f"step {state.steps + 1}: the gradient of {name} is not finite, but it has to be.")
    clip = rules.clip(state.ar, training, norm)
    rate = rules.rate(training, state.steps, state.tokens)
    load = rules.loads(seen.counts)
    after = updated(state, seen.gradients, clip, rate, seen.counts)
    after = replace(after, steps=state.steps + 1, tokens=state.tokens + seen.tokens)
    loss = total(seen.losses, training)
    report = Report(after.steps, seen.tokens, loss, seen.losses, rate, float(norm), float(clip), load)
    return after, report


def collect(state: State, batch: Sequence[Microbatch]) -> Collected:
    """Losses, gradients and counts of a batch.  Raises Invalid, as `step`."""
    if not isinstance(batch, Sequence) or not batch or not all(isinstance(one, Mapping) for one in batch):
        raise Invalid("the batch has to be a sequence of at least one microbatch, each a mapping.")
    model = state.model
    own = [_divisors(model, one) for one in batch]
    whole = reduce(plus, own)
    if not whole.targets[0]:
        raise Invalid("the number of targets is 0, but a step needs one that is not -100 or padding.")
    grads, seen, terms, counts, gates = model.gradients(), 0, [], [], []
    for number, (one, divisors) in enumerate(zip(batch, state.rules.divisors(own), strict=True)):
        result = model.forward(**one, trace=(), divisors=divisors, microbatch=number)
        model.backward(result, into=grads)
        terms.append(result.terms)
        counts.append(result.counts)
        gates.append(result.gates)
        seen += result.tokens
    losses = parts(state.ar, joined(terms), whole)
    if not all(np.isfinite(value) for value in losses.values()):
        raise _not_finite(state, batch)
    gradients = GradientMap(model.weights, state.ar, grads.reduce())
    return Collected(gradients, losses, counts, gates, seen)


def _divisors(model: Model, one: Microbatch) -> Divisors:
    return model.divisors(**{name: one[name] for name in _COUNTED if name in one})


def updated(
    state: State, gradients: Mapping[str, Array], clip: Array | float, rate: float, counts: Counts
) -> State:
    """Weights, moments, biases and the average after the step; the counters are as they were."""
    ar, rules, training = state.ar, state.rules, state.rules.at(state.training, state.tokens)
    powers = state.powers.next(training)
    weights, first, second = dict(state.weights), {}, {}
    average: dict[str, Array] = {}
    clipped = not (isinstance(clip, float) and clip == 1.0)

    def moved(w: Array, m: Array, v: Array, g: Array) -> tuple[Array, ...]:
        return rules.adamw(ar, training, rate, powers, w, m, v, g * clip if clipped else g)

    for name, gradient in gradients.items():
        old = (state.weights[name], state.first[name], state.second[name], gradient)
        weights[name], first[name], second[name] = _in_pieces(moved, *old)
        if state.average:
            average[name] = rules.average(ar, training.ema_decay, state.average[name], weights[name])
    for layer in counts[0] if counts else ():
        name = f"model.layers.{layer}.{BIAS}"
        if name in weights and training.bias_update_speed:
            own = [one[layer] for one in counts]
            weights[name] = rules.bias(ar, weights[name], own, training.bias_update_speed)
    return replace(state, weights=weights, first=first, second=second, average=average, powers=powers)


def _in_pieces(call: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
    """call(*arrays), which is element by element, some rows at a time: so that what is between stays in
    cache."""
    like = arrays[0]
    if like.size <= PIECE:
        return call(*arrays)
    rows = max(1, PIECE * len(like) // like.size)
    out: tuple[Array, ...] = ()
    for start in range(0, len(like), rows):
        piece = slice(start, start + rows)
        made = call(*(x[piece] for x in arrays))
        out = out or tuple(np.empty(like.shape, x.dtype) for x in made)
        for whole, part in zip(out, made, strict=True):
            whole[piece] = part
    return out


def _not_finite(state: State, batch: Sequence[Microbatch]) -> Invalid:
    """The first tensor, in the order of computation, that is not finite."""
    for number, one in enumerate(batch):
        result = state.model.forward(**one)
        for name, value in result.tensors.items():
            masked = name.endswith("self_attn.scores")
            if np.isnan(value).any() or (np.isinf(value).any() and not masked):
                return Invalid(
                    f"step {state.steps + 1}: the loss is not finite; the first tensor that is not is {name} "
                    f"of microbatch {number}."
                )
    return Invalid(f"step {state.steps + 1}: the loss is not finite, although all named tensors are.")
