"""One decoder layer.  SPEC BLOCK-1.

h = x + self_attn(input_layernorm(x));  y = h + mlp(post_attention_layernorm(h)).
The MLP is dense in the first layers and a mixture of experts in the others.
"""

from dataclasses import dataclass
from typing import Any

from refimpl.layers import mla, mlp, moe, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics import sites
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
    # What is computed again lives as long as the call that reads it.
    dout = (ops.mlp if dense else ops.moe).backward(c.at("mlp"), dy, _mlp_again(c, saved, dense), grads)
    dout = ops.norm.backward(c.at("post_attention_layernorm"), dout, saved.post_attention_layernorm, grads)
    dh = ar.at("d.residual", dy + dout)  # (T, D)
    dattended = ops.mla.backward(c.at("self_attn"), dh, _attention_again(c, saved, batch), batch, grads)
    dattended = ops.norm.backward(c.at("input_layernorm"), dattended, saved.input_layernorm, grads)
    return ar.at("d.residual", dh + dattended)  # (T, D)


def _mlp_again(c: Context, saved: Saved, dense: bool) -> Any:
    """What the MLP saved, with its input, the second norm's output, computed again where it was not kept."""
    if not c.ar.recomputes(*(("mlp.in",) if dense else moe.INPUTS)):
        return saved.mlp
    x = norm.again(c.at("post_attention_layernorm"), saved.post_attention_layernorm, c.config.rms_norm_eps)
    if dense:
        return mlp.given(saved.mlp, c.ar.keeping.operand("mlp.in", x))
    return c.ops.moe.again(c.at("mlp"), saved.mlp, x)


def _attention_again(c: Context, saved: Saved, batch: Batch) -> Any:
    """What attention saved, with what it did not keep, the first norm's output among it, computed again."""
    if not c.ar.recomputes("self_attn.in", *sites.UP):
        return saved.self_attn
    x = None
    if c.ar.recomputes("self_attn.in"):
        x = norm.again(c.at("input_layernorm"), saved.input_layernorm, c.config.rms_norm_eps)
    return c.ops.mla.again(c.at("self_attn"), saved.self_attn, x, batch)
