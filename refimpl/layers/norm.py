"""RMS normalisation.  SPEC NORM-1, NORM-2.

y[t, d] = x[t, d] * gain[d] / sqrt(mean_d x[t, d]^2 + eps)
"""

from dataclasses import dataclass, replace

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array, Kept
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    x: Kept  # (T, D)  the input
    inv_rms: Array  # (T, 1)
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, x: Array, eps: float) -> tuple[Array, Saved]:
    """x (T, D)  ->  y (T, D)."""
    ar, gain = c.ar, c.array("weight")  # (D,)
    inv_rms = 1.0 / ar.sqrt(ar.mean(x * x) + eps)[:, None]  # (T, 1)
    normed = ar.at("norm.normed", x * inv_rms)  # (T, D)  transformers rounds here, before the gain
    y = ar.at("norm.out", normed * gain)  # (T, D)
    return y, Saved(ar.keep("norm.in", x), inv_rms, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D); adds the gain's gradient."""
    ar, gain = c.ar, c.array("weight")  # (D,)
    dy = c.joined(dy)
    whole = saved.x.value() * saved.inv_rms  # (T, D)  recomputed, not stored
    normed = ar.at("norm.normed", whole)  # (T, D)
    grads.product_sum(c.name("weight"), c.microbatch, dy, normed)  # summed over tokens when read
    dn = ar.fused("d.norm.normed", dy * gain)  # (T, D)
    if ar.reads_source("norm.normed"):
        normed = whole
    return ar.at("d.norm.in", saved.inv_rms * (dn - normed * ar.mean(dn * normed)[:, None]))  # (T, D)


def again(c: Context, saved: Saved, eps: float) -> Array:
    """The output (T, D), computed again from what was kept."""
    y: Array = c.ops.norm.forward(replace(c, ar=c.ar.keeping, probing=False), saved.x.value(), eps)[0]
    return y
