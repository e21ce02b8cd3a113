"""RMSNorm computed in other ways.  SPEC NORM-1, NORM-2."""

from __future__ import annotations

import numpy as np

from refimpl.layers import norm
from refimpl.layers.context import Context, Op
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.variants.variation import Change, operations


def _root(c: Context, x: Array, eps: float) -> Array:
    return np.asarray(c.ar.mean(x * x) + eps)[:, None]


def _saved(c: Context, x: Array, inv_rms: Array, y: Array) -> tuple[Array, norm.Saved]:
    y = c.ar.at("norm.out", y)
    return y, norm.Saved(c.ar.keep("norm.in", x), inv_rms, c.probe(y))


def _divided(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
    rms = c.ar.sqrt(_root(c, x, eps))
    return _saved(c, x, 1.0 / rms, c.ar.at("norm.normed", x / rms) * c.array("weight"))


def _rsqrt(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
    inv_rms = c.ar.array(1.0 / np.sqrt(_root(c, x, eps).astype(np.float64)))  # one rounding
    return _saved(c, x, inv_rms, c.ar.at("norm.normed", x * inv_rms) * c.array("weight"))


def _gain_first(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
    inv_rms = 1.0 / c.ar.sqrt(_root(c, x, eps))
    return _saved(c, x, inv_rms, x * c.array("weight") * inv_rms)


def _from_input(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
    """dx = r (g - x r^2 mean(g x)) with g = dy gain."""
    ar, r, dy = c.ar, saved.inv_rms, c.joined(dy)
    x = saved.x.value()
    grads.product_sum(c.name("weight"), c.microbatch, dy, x * r)
    g = dy * c.array("weight")
    return ar.at("d.norm.in", r * (g - x * (r * r * ar.mean(g * x)[:, None])))


def _twice_divided(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
    """dx = g r - n (<g, n> / D) r, each product rounded by itself."""
    ar, r, dy = c.ar, saved.inv_rms, c.joined(dy)
    normed = saved.x.value() * r
    grads.product_sum(c.name("weight"), c.microbatch, dy * normed, np.ones_like(normed))
    g = dy * c.array("weight")
    share = ar.dot(g, normed)[:, None] * (1.0 / g.shape[-1])
    return ar.at("d.norm.in", g * r - normed * (share * r))


DIVIDED: Change = operations(norm=lambda ops: Op(_divided, _twice_divided))
RSQRT: Change = operations(norm=lambda ops: Op(_rsqrt, _from_input))
GAIN_FIRST: Change = operations(norm=lambda ops: Op(_gain_first, _from_input))
