"""The final norm and the output head.  SPEC HEAD-1.

logits = lm_head norm(x)
"""

from dataclasses import dataclass

from refimpl.layers import linear, norm
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    hidden: Array | None  # (T, D)  the norm's output, which MTP modules read forward
    normed: norm.Saved = child("model.norm")
    lm_head: linear.Saved = child("lm_head")
    logits: Array | None = tensor("logits")  # (T, V)


def forward(c: Context, x: Array) -> tuple[Array, Saved]:
    """x (T, D)  ->  logits (T, V)."""
    ar, ops = c.ar, c.ops
    normed, norm_saved = ops.norm.forward(c.at("model", "norm"), x, c.config.rms_norm_eps)
    logits, head_saved = ops.linear.forward(c.at("lm_head"), ar.operand("lm_head.in", normed))
    return logits, Saved(normed, norm_saved, head_saved, c.probe(logits))


def backward(
    c: Context, dlogits: Array, saved: Saved, grads: Gradients, dhidden: Array | None = None
) -> Array:
    """dlogits (T, V), dhidden (T, D) from the first MTP module  ->  dx (T, D)."""
    last = saved.lm_head
    if c.ar.recomputes("lm_head.in"):
        x = norm.again(c.at("model", "norm"), saved.normed, c.config.rms_norm_eps)
        last = linear.again(last, c.ar.keeping.operand("lm_head.in", x))
    dnormed = c.ops.linear.backward(c.at("lm_head"), c.joined(dlogits, "logits"), last, grads)
    if dhidden is not None:
        dnormed = c.ar.at("d.hidden", dnormed + dhidden)  # (T, D)
    dx: Array = c.ops.norm.backward(c.at("model", "norm"), dnormed, saved.normed, grads)
    return dx
