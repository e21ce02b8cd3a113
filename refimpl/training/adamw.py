"""AdamW with clipping, in the arithmetic of the run.  SPEC OPTIM-1 to OPTIM-4.

    norm = sqrt(sum over all gradients of g^2);   g = g * min(1, clip / (norm + epsilon_c))
    w = w - (rate decay) w;   m = m + (1 - beta1) (g - m);   v = beta2 v + ((1 - beta2) g) g
    w = w - (rate / (1 - beta1^n)) m / (sqrt(v) / sqrt(1 - beta2^n) + epsilon)
for step n = 1, 2, ...  The powers of beta are running products.  What is kept from step to step crosses the
sites optim.master, optim.moment1 and optim.moment2, so a recipe says in which format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from refimpl.config.training import TrainingConfig
from refimpl.numerics.arithmetic import Arithmetic, Array


@dataclass(frozen=True)
class Powers:
    """beta1^n and beta2^n after n steps."""

    beta1: float = 1.0
    beta2: float = 1.0

    def next(self, training: TrainingConfig) -> Powers:
        return replace(self, beta1=self.beta1 * training.adam_beta1, beta2=self.beta2 * training.adam_beta2)


def norm(ar: Arithmetic, gradients: Iterable[Array]) -> Array:
    """The global 2-norm (): the sum of squares of each tensor, then the sum of these, then the root."""
    squares = [ar.dot(g.reshape(-1), g.reshape(-1)) for g in gradients]
    return ar.sqrt(ar.sum(np.stack(squares)))


def clip_coefficient(ar: Arithmetic, training: TrainingConfig, total: Array) -> Array | float:
    """What all gradients are multiplied by; 1.0 where the norm is small enough."""
    coefficient = training.clip_norm / (total + training.clip_epsilon)
    return coefficient if ar.decide(coefficient) < 1.0 else 1.0


def update(
    ar: Arithmetic,
    training: TrainingConfig,
    rate: float,
    powers: Powers,
    weight: Array,
    first: Array,
    second: Array,
    gradient: Array,
) -> tuple[Array, Array, Array]:
    """A master weight, its moments and its clipped gradient, all of one shape  ->  the three after the step.

    powers: those of this step, already multiplied."""
    if training.weight_decay and (training.weight_decay_on == "all" or weight.ndim >= 2):
        weight = weight - (rate * training.weight_decay) * weight
    first = first + (1.0 - training.adam_beta1) * (gradient - first)
    second = training.adam_beta2 * second + ((1.0 - training.adam_beta2) * gradient) * gradient
    root = ar.sqrt(second) / float(np.sqrt(1.0 - powers.beta2)) + training.adam_epsilon
    weight = weight - (rate / (1.0 - powers.beta1)) * (first / root)
    return (
        ar.at("optim.master", weight),
        ar.at("optim.moment1", first),
        ar.at("optim.moment2", second),
    )


def average(ar: Arithmetic, decay: float, ema: Array, weight: Array) -> Array:
    """The exponential moving average of a parameter: ema + (1 - decay) (weight - ema)."""
    return ar.at("optim.ema", ema + (1.0 - decay) * (weight - ema))
