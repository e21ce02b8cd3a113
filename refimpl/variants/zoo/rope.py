"""Rotary tables and rotation computed in other ways.  SPEC ROPE-2 to ROPE-7."""

from __future__ import annotations

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import rope
from refimpl.layers.context import Context, Op
from refimpl.numerics import float32, functions
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.emulated import single
from refimpl.variants.variation import Change, operations


def _split(x: Array, interleaved: bool) -> tuple[Array, Array]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _joined(y0: Array, y1: Array, interleaved: bool) -> Array:
    if interleaved:
        return np.stack([y0, y1], -1).reshape(*y0.shape[:-1], -1)
    return np.concatenate([y0, y1], -1)


# x cos + rotated(x) sin, with both products stored before they are added, as separate kernels do.


def _products(c: Context, x: Array, cos: Array, sin: Array) -> Array:
    ar, interleaved = c.ar, c.config.rope_interleave
    x0, x1 = _split(x, interleaved)

    def kept(y: Array) -> Array:
        return ar.at("rope.product", y)

    return _joined(kept(x0 * cos) + kept(-x1 * sin), kept(x1 * cos) + kept(x0 * sin), interleaved)


def _products_forward(c: Context, x: Array, at: rope.Tables) -> Array:
    return c.ar.at("rope.out", _products(c, x, at.cos, at.sin))


def _products_backward(c: Context, dy: Array, at: rope.Tables) -> Array:
    return c.ar.at("d.rope.in", _products(c, dy, at.cos, -at.sin))


PRODUCTS_STORED: Change = operations(rope=lambda ops: Op(_products_forward, _products_backward))


# One product and one fused multiply-add for each component.


def _fused(c: Context, x: Array, cos: Array, sin: Array) -> Array:
    interleaved = c.config.rope_interleave
    x0, x1 = _split(x, interleaved)
    y0, y1 = float32.fma(x0, cos, -(x1 * sin)), float32.fma(x0, sin, x1 * cos)
    return _joined(y0, y1, interleaved)


def _fused_forward(c: Context, x: Array, at: rope.Tables) -> Array:
    return c.ar.at("rope.out", _fused(c, x, at.cos, at.sin))


def _fused_backward(c: Context, dy: Array, at: rope.Tables) -> Array:
    return c.ar.at("d.rope.in", _fused(c, dy, at.cos, -at.sin))


FUSED: Change = operations(rope=lambda ops: Op(_fused_forward, _fused_backward))


# Angles, cos and sin in float64, rounded once, when they are stored.


def _fine(c: Context, positions: Array) -> rope.Tables:
    angle = positions[:, None].astype(np.float64) * c.ops.frequencies(c.config, c.choices)
    factor = c.ops.cos_sin_factor(c.config, c.choices)
    cos, sin = functions.cos(angle) * factor, functions.sin(angle) * factor
    ar = c.ar
    stored = [ar.at("rope.table", ar.array(part))[:, None, :] for part in (cos, sin)]
    return rope.Tables(*stored)


FINE_TABLES: Change = operations(tables=lambda ops: _fine)


# Constants in float32, step by step, as a program without float64 computes them.


def _frequencies(config: ModelConfig, choices: Choices) -> Array:
    width = config.qk_rope_head_dim
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    log = float(functions.log(np.float64(config.rope_theta)))
    plain = np.float32(1.0) / single(functions.exp(exponent.astype(np.float64) * log))  # theta^exponent
    scaling = rope.yarn(config, choices)
    if scaling is None:
        return plain.astype(np.float64)
    low, high = rope.ramp_bounds(scaling, width, float(config.rope_theta))
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    ramp = np.clip(ramp, np.float32(0.0), np.float32(1.0))
    keep = np.float32(1.0) - ramp
    mixed: Array = plain / np.float32(scaling.factor) * (np.float32(1.0) - keep) + plain * keep
    return mixed.astype(np.float64)


def _scale(config: ModelConfig, choices: Choices) -> float:
    scale = np.float32(1.0) / np.sqrt(np.float32(config.qk_head_dim))
    scaling = rope.yarn(config, choices)
    if scaling is None or not scaling.mscale_all_dim:
        return float(scale)
    log = single(functions.log(np.array([max(scaling.factor, 1.0)])))
    factor = np.float32(0.1) * np.float32(scaling.mscale_all_dim) * log + np.float32(1.0)
    return float((scale * (factor * factor))[0])


SINGLE_CONSTANTS: Change = operations(frequencies=lambda ops: _frequencies, softmax_scale=lambda ops: _scale)
