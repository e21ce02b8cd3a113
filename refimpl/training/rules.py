"""The rules of a training step, as one record.  SPEC STEP-2.

A variant of the step is `replace(rules, bias=...)`, as a variant of the model is `replace(ops, gate=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add as plus

from refimpl.config.training import TrainingConfig
from refimpl.losses import Divisors
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.training import adamw, bias, loads, schedules

Moved = tuple[Array, Array, Array]  # a weight and its two moments


def whole_batch(own: Sequence[Divisors]) -> list[Divisors]:
    """The divisors of each microbatch alone  ->  by what each of them divides: the whole batch's counts."""
    total = reduce(plus, own)
    return [total] * len(own)


@dataclass(frozen=True)
class Rules:
    """The replaceable rules; the comments say what each is given and gives."""

    rate: Callable[[TrainingConfig, int, int], float]  # steps, tokens seen  ->  learning rate
    at: Callable[[TrainingConfig, int], TrainingConfig]  # tokens seen  ->  with lambda and gamma of then
    divisors: Callable[[Sequence[Divisors]], Sequence[Divisors]]  # of each microbatch  ->  what each uses
    norm: Callable[[Arithmetic, Iterable[Array]], Array]  # gradients  ->  their norm ()
    clip: Callable[[Arithmetic, TrainingConfig, Array], Array | float]  # norm  ->  coefficient
    adamw: Callable[..., Moved]  # see adamw.update
    average: Callable[[Arithmetic, float, Array, Array], Array]  # decay, average, weight  ->  average
    loads: Callable[[Iterable[Mapping[int, Array]]], loads.Loads]  # counts of microbatches  ->  of the batch
    bias: Callable[[Arithmetic, Array, Sequence[Array], float], Array]  # see bias.update


DEEPSEEK_V3 = Rules(
    rate=schedules.learning_rate,
    at=TrainingConfig.at,
    divisors=whole_batch,
    norm=adamw.norm,
    clip=adamw.clip_coefficient,
    adamw=adamw.update,
    average=adamw.average,
    loads=loads.add,
    bias=bias.update,
)
