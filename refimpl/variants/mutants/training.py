"""Mistakes of the selection bias' update.  SPEC BIAS-1 to BIAS-3, OPTIM-3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from refimpl.config.training import TrainingConfig
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.programs import Setting
from refimpl.training import loads
from refimpl.training.rules import Rules
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change

FINE: Final = ("fp32", "tf32")  # biases, weights and moments are float32 in every port
Update = Callable[[Arithmetic, Array, Sequence[Array], float], Array]


def _ruled(**made: Callable[[Rules], Any]) -> Change:
    """Rules of the step replaced, each made from the rules as they were."""
    return lambda s: replace(
        s, rules=replace(s.rules, **{name: make(s.rules) for name, make in made.items()})
    )


def _often(rules: Rules) -> Update:
    """A step after each microbatch."""

    def update(ar: Arithmetic, b: Array, counts: Sequence[Array], speed: float) -> Array:
        for own in counts:
            b = rules.bias(ar, b, [own], speed)
        return b

    return update


def _first_half(counts: Sequence[Array]) -> Sequence[Array]:
    """The microbatches of the first of two ranks."""
    return counts[: max(len(counts) // 2, 1)]


def _local(rules: Rules) -> Update:
    return lambda ar, b, counts, speed: rules.bias(ar, b, _first_half(counts), speed)


def _local_loads(rules: Rules) -> Callable[[Iterable[Mapping[int, Array]]], loads.Loads]:
    return lambda parts: rules.loads(_first_half(list(parts)))  # type: ignore[arg-type]


def _twice(rules: Rules) -> Callable[[Iterable[Mapping[int, Array]]], loads.Loads]:
    """Each microbatch is counted again when its forward pass is repeated."""
    return lambda parts: {layer: 2 * load for layer, load in rules.loads(parts).items()}


def _centred(rules: Rules) -> Update:
    def update(ar: Arithmetic, b: Array, counts: Sequence[Array], speed: float) -> Array:
        moved = rules.bias(ar, b, counts, speed)
        return ar.at("optim.bias", moved - ar.mean(moved - b))

    return update


def _never(rules: Rules) -> Update:
    return lambda ar, b, counts, speed: b


def _decayed(s: Setting) -> Setting:
    """The optimiser decays the bias, as it does parameters; it has no gradient."""
    last = [0.0]  # rate times decay of this step

    def rate(training: TrainingConfig, steps: int, tokens: int) -> float:
        found = s.rules.rate(training, steps, tokens)
        last[0] = found * training.weight_decay
        return found

    def update(ar: Arithmetic, b: Array, counts: Sequence[Array], speed: float) -> Array:
        return s.rules.bias(ar, b - last[0] * b, counts, speed)

    return replace(s, rules=replace(s.rules, rate=rate, bias=update))


MUTANTS: Final = (
    Mutant("L07", _ruled(bias=_often), FINE),
    Mutant("L08", _ruled(loads=_twice), FINE),
    Mutant("L09", _ruled(bias=_local, loads=_local_loads), FINE),
    Mutant("L10", _ruled(bias=_never), FINE),
    Mutant("L11", _ruled(bias=_centred), benign=True),
    Mutant("L13", _decayed, FINE),
)
