"""Mistakes of YaRN: its frequencies, and the factors of cos, sin and the softmax.  SPEC ROPE-1 to ROPE-4.

g(m) = 0.1 m ln(factor) + 1;  the softmax scale is (nope + R)^(-1/2) g(mscale_all_dim)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.rope import YarnScaling
from refimpl.layers import rope
from refimpl.layers.context import Ops
from refimpl.numerics import functions
from refimpl.numerics.arithmetic import Array
from refimpl.programs import Setting
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change, chosen, operations

Frequencies = Callable[[ModelConfig, Choices], Array]


def _plain(config: ModelConfig, choices: Choices, stretch: float = 1.0) -> Array:
    """(stretch theta)^(-2m/R), without YaRN."""
    base = replace(config, rope_scaling=None, rope_theta=stretch * config.rope_theta)
    return rope.inverse_frequencies(base, choices)


def _yarn(of: Callable[[ModelConfig, Choices, YarnScaling], Array]) -> Change:
    """Other frequencies where YaRN applies."""

    def made(ops: Ops) -> Frequencies:
        def frequencies(config: ModelConfig, choices: Choices) -> Array:
            scaling = rope.yarn(config, choices)
            if scaling is None:
                right: Array = ops.frequencies(config, choices)
                return right
            return of(config, choices, scaling)

        return frequencies

    return operations(frequencies=made)


def _ramped(plain: Array, divided: Array, low: float, high: float) -> Array:
    """divided beyond the ramp from low to high, plain before it."""
    high = high if high != low else high + 0.001
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    return np.asarray(divided * ramp + plain * (1.0 - ramp))


def _not_truncated(config: ModelConfig, choices: Choices, scaling: YarnScaling) -> Array:
    width, plain = config.qk_rope_head_dim, _plain(config, choices)

    def dimension(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2.0 * math.pi)
        return width * _log(length) / (2.0 * _log(config.rope_theta))

    low, high = max(dimension(scaling.beta_fast), 0.0), min(dimension(scaling.beta_slow), width - 1.0)
    return _ramped(plain, plain / scaling.factor, low, high)


def _clamped_at_half(config: ModelConfig, choices: Choices, scaling: YarnScaling) -> Array:
    width, plain = config.qk_rope_head_dim, _plain(config, choices)
    low, high = rope.ramp_bounds(scaling, width, config.rope_theta)
    return _ramped(plain, plain / scaling.factor, low, min(high, width / 2 - 1.0))


def _factor_in_power(config: ModelConfig, choices: Choices, scaling: YarnScaling) -> Array:
    low, high = rope.ramp_bounds(scaling, config.qk_rope_head_dim, config.rope_theta)
    return _ramped(_plain(config, choices), _plain(config, choices, scaling.factor), low, high)


def _by_length(s: Setting) -> Setting:
    """YaRN applies where this run's own positions go beyond the original context."""
    places = s.inputs.get("position_ids")
    if places is None:
        given = next((s.inputs[name] for name in ("x", "input_ids", "query") if name in s.inputs), None)
        longest = 1 if given is None else given.shape[1 if given.ndim < 4 else 2]
    else:
        longest = int(places.max()) + 1
    return chosen(yarn_applies=_unless_never(s, "beyond_original"), max_seq_len=longest)(s)


def _in_4096(s: Setting) -> Setting:
    """The longest sequence is taken for 4096, whatever the configuration or the choice say."""
    return chosen(yarn_applies=_unless_never(s, "beyond_original"), max_seq_len=4096)(s)


def _always(s: Setting) -> Setting:
    return chosen(yarn_applies=_unless_never(s, "config"))(s)


def _unless_never(s: Setting, applies: str) -> str:
    return "never" if s.choices.yarn_applies == "never" else applies


def _g(scaling: YarnScaling, mscale: float, unit: float = 0.1) -> float:
    return 1.0 if scaling.factor <= 1.0 else unit * mscale * _log(scaling.factor) + 1.0


def _scaled(of: Callable[[YarnScaling], float]) -> Change:
    """Another factor of the softmax scale under YaRN."""

    def scale(config: ModelConfig, choices: Choices) -> float:
        scaling = rope.yarn(config, choices)
        return (1.0 if scaling is None else of(scaling)) / math.sqrt(config.qk_head_dim)

    return operations(softmax_scale=lambda ops: scale)


def _all_dim(scaling: YarnScaling, unit: float = 0.1) -> float:
    return _g(scaling, scaling.mscale_all_dim or 0.0, unit)


def _cos_sin_scaled(config: ModelConfig, choices: Choices) -> float:
    scaling = rope.yarn(config, choices)
    return 1.0 if scaling is None else _g(scaling, scaling.mscale or 1.0)


def _squared(x: float) -> float:
    return x * x


def _log(x: float) -> float:
    return float(functions.log(np.float64(x)))


MUTANTS: Final = (
    Mutant("Y01", _yarn(lambda config, choices, scaling: _plain(config, choices))),
    Mutant("Y02a", _always),
    Mutant("Y02b", _by_length),
    Mutant("Y02c", _in_4096),
    Mutant("Y03", _yarn(_not_truncated)),
    Mutant("Y04", _yarn(_clamped_at_half), benign=True),
    Mutant("Y05", _yarn(_factor_in_power)),
    Mutant("Y06", operations(cos_sin_factor=lambda ops: _cos_sin_scaled)),
    Mutant("Y07", _scaled(lambda scaling: 1.0)),
    Mutant("Y08", _scaled(lambda scaling: _squared(_g(scaling, scaling.mscale or 0.0)))),
    Mutant("Y09a", _scaled(_all_dim)),
    Mutant("Y09b", _scaled(lambda scaling: _squared(_squared(_all_dim(scaling))))),
    Mutant("Y10", _scaled(lambda scaling: _squared(_all_dim(scaling, 0.01)))),
)
