"""Rotary positions with YaRN.  SPEC ROPE-1 to ROPE-7.

inv_freq[m] = theta^(-2m/R), m = 0 .. R/2 - 1; under YaRN, with a ramp that is linear in m,
    inv_freq[m] = inv_freq[m] / factor * ramp[m] + inv_freq[m] * (1 - ramp[m])
angle[t, m] = position[t] * inv_freq[m];  pair m of a head is rotated by its angle:
    y0 = x0 cos - x1 sin,   y1 = x0 sin + x1 cos
Pairs are (0, 1), (2, 3), ... when interleaved, else (m, m + R/2).
"""

import math
from dataclasses import dataclass

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.rope import YarnScaling
from refimpl.layers.context import Context
from refimpl.numerics import functions
from refimpl.numerics.arithmetic import Array


@dataclass(frozen=True)
class Tables:
    """cos and sin of every token's angles, (T, 1, R/2): one row serves all heads."""

    cos: Array
    sin: Array


def tables(c: Context, positions: Array) -> Tables:
    """positions (T,) int  ->  cos, sin (T, 1, R/2), both times the attention factor."""
    ar, ops = c.ar, c.ops
    frequencies = ar.fused("rope.frequency", ar.array(ops.frequencies(c.config, c.choices)))  # (R/2,)
    angle = ar.fused("rope.angle", ar.array(positions)[:, None] * frequencies)  # (T, R/2)
    factor = ops.cos_sin_factor(c.config, c.choices)
    cos = ar.at("rope.table", ar.cos(angle) * factor)  # (T, R/2)
    sin = ar.at("rope.table", ar.sin(angle) * factor)
    return Tables(cos[:, None, :], sin[:, None, :])


def forward(c: Context, x: Array, at: Tables) -> Array:
    """x (T, H, R)  ->  rotated (T, H, R), in the layout of x."""
    return c.ar.at("rope.out", _rotate(c, "rope.product", x, at.cos, at.sin))


def backward(c: Context, dy: Array, at: Tables) -> Array:
    """dy (T, H, R)  ->  dx (T, H, R): the rotation by the opposite angle."""
    return c.ar.at("d.rope.in", _rotate(c, "d.rope.product", dy, at.cos, -at.sin))


def _rotate(c: Context, site: str, x: Array, cos: Array, sin: Array) -> Array:
    half, interleaved = x.shape[-1] // 2, c.config.rope_interleave
    x0, x1 = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])  # (T, H, R/2)
    y0 = c.ar.fused(site, x0 * cos) - c.ar.fused(site, x1 * sin)  # (T, H, R/2)
    y1 = c.ar.fused(site, x0 * sin) + c.ar.fused(site, x1 * cos)  # (T, H, R/2)
    return np.stack([y0, y1], -1).reshape(x.shape) if interleaved else np.concatenate([y0, y1], -1)


def yarn(config: ModelConfig, choices: Choices) -> YarnScaling | None:
    """The scaling that applies, or None.  A choice: transformers applies it whenever the config has it,
    DeepSeek's code only when its maximum length exceeds the original context."""
    return config.rope_scaling if choices.yarn_active(config) else None


def inverse_frequencies(config: ModelConfig, choices: Choices) -> Array:
    """(R/2,) float64.  The powers are correctly rounded exponentials: see SPEC ROPE-2."""
    width, base = config.qk_rope_head_dim, float(config.rope_theta)
    m = np.arange(width // 2, dtype=np.float64)
    plain = functions.exp(-(2.0 * m / width) * _log(base))  # (R/2,)
    scaling = yarn(config, choices)
    if scaling is None:
        return plain
    low, high = ramp_bounds(scaling, width, base)
    ramp = np.clip((m - low) / (high - low), 0.0, 1.0)
    return plain / scaling.factor * ramp + plain * (1.0 - ramp)


def ramp_bounds(scaling: YarnScaling, width: int, base: float) -> tuple[float, float]:
    """Where the ramp begins and ends: the dimensions that turn beta_fast and beta_slow times over the
    original context, rounded outwards.  DeepSeek's code, not the paper, whose ramp is linear in turns."""

    def dimension(turns: float) -> float:
        return (
            width
            * _log(scaling.original_max_position_embeddings / (turns * 2.0 * math.pi))
            / (2.0 * _log(base))
        )

    low = max(float(math.floor(dimension(scaling.beta_fast))), 0.0)
    high = min(float(math.ceil(dimension(scaling.beta_slow))), width - 1.0)
    return low, high if high != low else high + 0.001


def softmax_scale(config: ModelConfig, choices: Choices) -> float:
    """(nope + rope width)^(-1/2), times the square of YaRN's factor when YaRN applies, on the whole logit."""
    scale = 1.0 / math.sqrt(config.qk_head_dim)
    scaling = yarn(config, choices)
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    factor = _mscale(scaling.factor, scaling.mscale_all_dim)
    return scale * factor * factor


def cos_sin_factor(config: ModelConfig, choices: Choices) -> float:
    """mscale over mscale_all_dim: 1 in every published config."""
    scaling = yarn(config, choices)
    if scaling is None:
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    if choices.yarn_mscale_zero == "hf":
        return _mscale(scaling.factor, 1.0)
    own = 1.0 if scaling.mscale is None else scaling.mscale
    return _mscale(scaling.factor, own) / _mscale(scaling.factor, scaling.mscale_all_dim or 0.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * _log(factor) + 1.0


def _log(x: float) -> float:
    return float(functions.log(np.float64(x)))
