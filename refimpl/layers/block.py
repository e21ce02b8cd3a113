"""One decoder layer.  SPEC BLOCK-1.

h = x + self_attn(input_layernorm(x));  y = h + mlp(post_attention_layernorm(h)).
The MLP is dense in the first layers and a mixture of experts in the others.
"""

from dataclasses import dataclass, replace
from typing import Any

from refimpl.layers import mla, mlp, moe, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    input_layernorm: norm.Saved = child("input_layernorm")
    self_attn: mla.Saved = child("self_attn")
    post_attention_layernorm: norm.Saved = child("post_attention_layernorm")
    mlp: Any = child("mlp")  # mlp.Saved of a dense layer, moe.Saved of the others
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, x: Array, batch: Batch, dense: bool) -> tuple[Array, Saved]:
    """x (T, D)  ->  (T, D)."""
    ar, ops, eps = c.ar, c.ops, c.config.rms_norm_eps
    normed, norm1 = ops.norm.forward(c.at("input_layernorm"), x, eps)
    attended, attn = ops.mla.forward(c.at("self_attn"), normed, batch)
    h = ar.at("residual", x + attended)  # (T, D)
    normed, norm2 = ops.norm.forward(c.at("post_attention_layernorm"), h, eps)
    inner = c.at("mlp")
    out, second = (
        ops.mlp.forward(inner, ar.operand("mlp.in", normed)) if dense else ops.moe.forward(inner, normed)
    )
    y = ar.at("residual", h + out)  # (T, D)
    return y, Saved(norm1, attn, norm2, second, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, batch: Batch, dense: bool, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D)."""
    ar, ops = c.ar, c.ops
    dy = c.joined(dy)
    saved = _mlp_again(c, saved, dense)
    dout = (ops.mlp if dense else ops.moe).backward(c.at("mlp"), dy, saved.mlp, grads)
    dout = ops.norm.backward(c.at("post_attention_layernorm"), dout, saved.post_attention_layernorm, grads)
    dh = ar.at("d.residual", dy + dout)  # (T, D)
    saved = _attention_again(c, saved, batch)
    dattended = ops.mla.backward(c.at("self_attn"), dh, saved.self_attn, batch, grads)
    dattended = ops.norm.backward(c.at("input_layernorm"), dattended, saved.input_layernorm, grads)
    return ar.at("d.residual", dh + dattended)  # (T, D)


def _mlp_again(c: Context, saved: Saved, dense: bool) -> Saved:
    """With what the MLP did not keep of its input, the second norm's output, computed again."""
    if not c.ar.recomputes(*(("mlp.in",) if dense else moe.INPUTS)):
        return saved
    x = norm.again(c.at("post_attention_layernorm"), saved.post_attention_layernorm, c.config.rms_norm_eps)
    inner = c.at("mlp")
    if dense:
        return replace(saved, mlp=mlp.given(saved.mlp, c.ar.keeping.operand("mlp.in", x)))
    return replace(saved, mlp=c.ops.moe.again(inner, saved.mlp, x))


def _attention_again(c: Context, saved: Saved, batch: Batch) -> Saved:
    """With what attention did not keep, the first norm's output among it, computed again."""
    if not c.ar.recomputes("self_attn.in", *mla.UP_SITES):
        return saved
    x = norm.again(c.at("input_layernorm"), saved.input_layernorm, c.config.rms_norm_eps)
    return replace(saved, self_attn=c.ops.mla.again(c.at("self_attn"), saved.self_attn, x, batch))
