"""The values of a training run: loss weights, balancing, optimiser, schedules.  SPEC CONF-5.

The defaults are DeepSeek-V3's pre-training (report, section 4.2).  The published config's `aux_loss_alpha` is
a leftover and never enters a loss.  Phases that change a value are pairs (from that many tokens on, value).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from refimpl.config.rules import Rule, integer, one_of, real, ruled, settle, show
from refimpl.errors import Invalid

_TOKENS = integer(low=0, high=2**63 - 1)
_FROM_ZERO = real(strict=False)


def _phases() -> Rule:
    """A tuple of (tokens, value), tokens rising."""

    def convert(value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, list | tuple) or any(
            not isinstance(p, list | tuple) or len(p) != 2 for p in value
        ):
            raise Invalid(f"training phases are {show(value)}, but they must be pairs (tokens, value).")
        pairs = tuple(
            (_TOKENS.settle("training phase start", start), _FROM_ZERO.settle("training phase value", number))
            for start, number in value
        )
        starts = [start for start, _ in pairs]
        if starts != sorted(set(starts)):
            raise Invalid(f"training phases start at {show(starts)}, but starts must rise.")
        return pairs

    return Rule("pairs (tokens, value)", convert)


def _shares() -> Rule:
    """A tuple of rising numbers."""

    def convert(value: Any) -> tuple[float, ...]:
        if not isinstance(value, list | tuple):
            raise Invalid(f"training shares are {show(value)}, but they must be a list of numbers.")
        shares = tuple(_FROM_ZERO.settle("training share", share) for share in value)
        if list(shares) != sorted(set(shares)):
            raise Invalid(f"training shares are {show(shares)}, but they must rise.")
        return shares

    return Rule("rising numbers", convert)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training run decides.  Raises Invalid when a field breaks its rule."""

    mtp_loss_weight: float = ruled(_FROM_ZERO, "lambda, weight of the MTP loss", default=0.3)
    mtp_loss_weight_phases: tuple[tuple[int, float], ...] = ruled(
        _phases(), "later values of lambda", default=((10_000_000_000_000, 0.1),)
    )
    balance_loss_weight: float = ruled(_FROM_ZERO, "alpha, weight of the balance loss", default=1e-4)
    expert_balance_weight: float = ruled(_FROM_ZERO, "alpha 1, V2's expert-level loss", default=0.0)
    device_balance_weight: float = ruled(_FROM_ZERO, "alpha 2, V2's device-level loss", default=0.0)
    communication_balance_weight: float = ruled(_FROM_ZERO, "alpha 3, V2's communication loss", default=0.0)
    balance_devices: int = ruled(integer(), "devices that the experts of V2's losses are on", default=8)
    bias_update_speed: float = ruled(_FROM_ZERO, "gamma, step of the selection bias", default=1e-3)
    bias_update_speed_phases: tuple[tuple[int, float], ...] = ruled(
        _phases(), "later values of gamma", default=((14_300_000_000_000, 0.0),)
    )
    adam_beta1: float = ruled(real(high=1.0, strict=False), "decay of the first moment", default=0.9)
    adam_beta2: float = ruled(real(high=1.0, strict=False), "decay of the second moment", default=0.95)
    adam_epsilon: float = ruled(
        _FROM_ZERO, "epsilon of AdamW; the report has none, this is the customary", default=1e-8
    )
    weight_decay: float = ruled(_FROM_ZERO, "decoupled weight decay", default=0.1)
    clip_norm: float = ruled(real(), "largest global norm of the gradient", default=1.0)
    clip_epsilon: float = ruled(
        _FROM_ZERO, "added to the norm that clips; torch's clip_grad_norm_ has 1e-6", default=1e-6
    )
    weight_decay_on: str = ruled(
        one_of("all", "matrices"), "every parameter, or those of two dimensions; not published", default="all"
    )
    ema_decay: float = ruled(
        real(high=1.0, strict=False), "of the parameters' average, 0 for none; not published", default=0.0
    )
    learning_rate_schedule: str = ruled(
        one_of("cosine", "steps", "constant"), "V3's, V2's, or none after the rise", default="cosine"
    )
    learning_rate: float = ruled(_FROM_ZERO, "peak", default=2.2e-4)
    warmup_steps: int = ruled(_TOKENS, "steps of the linear rise from 0 to the peak", default=2000)
    constant_tokens: int = ruled(_TOKENS, "tokens until which the peak is held", default=10_000_000_000_000)
    cosine_tokens: int = ruled(_TOKENS, "tokens of the cosine decay after that", default=4_300_000_000_000)
    cosine_learning_rate: float = ruled(_FROM_ZERO, "where the cosine decay ends", default=2.2e-5)
    final_tokens: int = ruled(
        _TOKENS, "tokens at the cosine's end before the last phase", default=333_000_000_000
    )
    final_learning_rate: float = ruled(_FROM_ZERO, "last phase, to the end", default=7.3e-6)
    decay_factor: float = ruled(_FROM_ZERO, "of the rate at each of decay_shares (V2)", default=0.316)
    decay_shares: tuple[float, ...] = ruled(
        _shares(), "of total_tokens, after which the rate decays (V2)", default=(0.6, 0.9)
    )
    total_tokens: int = ruled(_TOKENS, "tokens of the run", default=14_800_000_000_000)
    sequence_length: int = ruled(integer(), "tokens of a sequence", default=4096)
    batch_sequences: int = ruled(integer(), "sequences of a step at the beginning", default=3072)
    final_batch_sequences: int = ruled(integer(), "sequences of a step after the ramp", default=15360)
    batch_ramp_tokens: int = ruled(
        _TOKENS, "tokens of the ramp, whose shape is not published", default=469_000_000_000
    )
    batch_ramp_shape: str = ruled(one_of("linear", "none"), "linear in tokens, or no ramp", default="linear")
    initializer_std: float = ruled(_FROM_ZERO, "standard deviation of the initial parameters", default=0.006)

    def __post_init__(self) -> None:
        settle(self, "training field")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TrainingConfig:
        """From names and values; what is absent is at its default.  Raises Invalid for unknown names."""
        names = [item.name for item in fields(cls)]
        for name in given:
            if name not in names:
                raise Invalid(
                    f"training field {show(name)} is unknown, but it must be one of {', '.join(names)}."
                )
        return cls(**given)

    def at(self, tokens: int) -> TrainingConfig:
        """With lambda and gamma as they are after that many tokens."""
        return replace(
            self,
            mtp_loss_weight=_in_phase(self.mtp_loss_weight, self.mtp_loss_weight_phases, tokens),
            bias_update_speed=_in_phase(self.bias_update_speed, self.bias_update_speed_phases, tokens),
            mtp_loss_weight_phases=(),
            bias_update_speed_phases=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only: phases as lists."""
        return {
            name: _listed(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def _listed(value: tuple[Any, ...]) -> list[Any]:
    return [list(x) if isinstance(x, tuple) else x for x in value]


def _in_phase(value: float, phases: tuple[tuple[int, float], ...], tokens: int) -> float:
    for start, later in phases:
        value = later if tokens >= start else value
    return value
