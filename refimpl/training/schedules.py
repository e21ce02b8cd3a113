"""What changes in the course of a run, as functions of the steps and tokens seen.  SPEC SCHED-1 to SCHED-4.

V3 (report, sections 4.2 and 4.3): linear rise over 2000 steps, a constant until 10T tokens, a cosine to a
tenth over 4.3T, that for 333B and 7.3e-6 for the rest; 3072 to 15360 sequences a step over 469B tokens.
V2 (sections 3.1.2 and 3.1.4): linear rise, then 0.316 of the rate at 60% and again at 90% of the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from refimpl.config.training import TrainingConfig
from refimpl.numerics import functions


@dataclass(frozen=True)
class ContextPhase:
    """A phase that extends the context after pre-training, with YaRN: scale 40, beta 32 and 1."""

    sequence_length: int
    batch_sequences: int
    steps: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.batch_sequences * self.steps


CONTEXT_EXTENSION: Final = (
    ContextPhase(32768, 1920, 1000, 7.3e-6),
    ContextPhase(131072, 480, 1000, 7.3e-6),
)

V3: Final = TrainingConfig()
V2: Final = TrainingConfig(
    learning_rate_schedule="steps",
    learning_rate=2.4e-4,
    total_tokens=8_100_000_000_000,
    batch_sequences=2304,
    final_batch_sequences=9216,
    batch_ramp_tokens=225_000_000_000,
    mtp_loss_weight=0.0,
    mtp_loss_weight_phases=(),
    balance_loss_weight=0.0,
    bias_update_speed=0.0,
    bias_update_speed_phases=(),
    expert_balance_weight=0.003,
    device_balance_weight=0.05,
    communication_balance_weight=0.02,
)
V2_LITE: Final = TrainingConfig(
    **{
        **V2.to_dict(),
        "learning_rate": 4.2e-4,
        "decay_shares": (0.8, 0.9),
        "total_tokens": 5_700_000_000_000,
        "batch_sequences": 4608,
        "final_batch_sequences": 4608,
        "batch_ramp_shape": "none",
        "expert_balance_weight": 0.001,
        "device_balance_weight": 0.0,
        "communication_balance_weight": 0.0,
    }
)


def learning_rate(training: TrainingConfig, steps: int, tokens: int) -> float:
    """The rate of the step that is taken after so many steps and tokens.

    The first step of the warm-up has 1 / warmup_steps of the peak, so that none is lost."""
    if steps < training.warmup_steps:
        return training.learning_rate * ((steps + 1) / training.warmup_steps)
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    if training.learning_rate_schedule == "steps":
        passed = sum(tokens >= share * training.total_tokens for share in training.decay_shares)
        return training.learning_rate * math.prod([training.decay_factor] * passed)
    into = tokens - training.constant_tokens
    if into < 0:
        return training.learning_rate
    if into < training.cosine_tokens:
        half_turn = float(functions.cos(np.float64(math.pi * (into / training.cosine_tokens))))
        low = training.cosine_learning_rate
        return low + (training.learning_rate - low) * (0.5 * (1.0 + half_turn))
    if into < training.cosine_tokens + training.final_tokens:
        return training.cosine_learning_rate
    return training.final_learning_rate


def batch_sequences(training: TrainingConfig, tokens: int) -> int:
    """Sequences of the step that is taken after so many tokens.  The shape of the published ramp is not
    known; linear in tokens, rounded down, is a choice."""
    first, last = training.batch_sequences, training.final_batch_sequences
    if training.batch_ramp_shape == "none" or tokens >= training.batch_ramp_tokens:
        return last
    return first + (last - first) * tokens // training.batch_ramp_tokens
