"""Multi-head latent attention, naive form.  SPEC MLA-1 to MLA-5; report equations 1 to 11.

c_q = norm(q_a x);  [q_nope; q_pe] = q_b c_q per head            (or one q_proj, without the query latent)
[c_raw; k_pe] = kv_a x;  c_kv = norm(c_raw);  [k_nope; v] = kv_b c_kv per head
q = [q_nope; rope(q_pe)], k = [k_nope; rope(k_pe), shared by all heads];  u = o_proj [o_1; ...; o_H]
"""

from dataclasses import dataclass

import numpy as np

from refimpl.layers import attention, linear, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class QuerySaved:
    q_a_proj: linear.Saved | None = child("q_a_proj")
    q_a_layernorm: norm.Saved | None = child("q_a_layernorm")
    q_b_proj: linear.Saved | None = child("q_b_proj")
    q_proj: linear.Saved | None = child("q_proj")


@dataclass(frozen=True)
class Saved:
    query: QuerySaved = child("")
    kv_a_proj: linear.Saved = child("kv_a_proj_with_mqa")
    kv_a_layernorm: norm.Saved = child("kv_a_layernorm")
    kv_b_proj: linear.Saved = child("kv_b_proj")
    q_pe: Array | None = tensor("q_pe")  # (T, H, R)  rotated
    k_pe: Array | None = tensor("k_pe")  # (T, 1, R)  rotated
    attended: attention.Saved = child("")
    heads: Array | None = tensor("heads")  # (T, H Wv)  the input of o_proj
    o_proj: linear.Saved = child("o_proj")
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, x: Array, batch: Batch) -> tuple[Array, Saved]:
    """x (T, D), already normalised  ->  (T, D)."""
    ar, ops, cfg = c.ar, c.ops, c.config
    tokens, heads, nope = x.shape[0], cfg.num_attention_heads, cfg.qk_nope_head_dim
    hidden = ar.operand("self_attn.in", x)  # (T, D)  read by q_a (or q) and kv_a
    query, query_saved = _query(c, hidden)
    query = query.reshape(tokens, heads, cfg.qk_head_dim)
    down, kv_a_saved = ops.linear.forward(c.at("kv_a_proj_with_mqa"), hidden)  # (T, C + R)
    latent, k_pe = down[:, : cfg.kv_lora_rank], down[:, None, cfg.kv_lora_rank :]  # (T, C), (T, 1, R)
    latent, norm_saved = ops.norm.forward(c.at("kv_a_layernorm"), latent, c.choices.norm_epsilon(c.config))
    up, kv_b_saved = ops.linear.forward(c.at("kv_b_proj"), ar.operand("kv_b_proj.in", latent))
    up = up.reshape(tokens, heads, nope + cfg.v_head_dim)  # per head: key rows, then value rows
    q_pe = ops.rope.forward(c, query[..., nope:], batch.tables)  # (T, H, R)
    k_pe = ops.rope.forward(c, k_pe, batch.tables)  # (T, 1, R)
    shared = np.broadcast_to(k_pe, q_pe.shape)  # (T, H, R)  one key part for all heads
    out, attention_saved = ops.attention.forward(
        c,
        batch.heads(np.concatenate([query[..., :nope], q_pe], -1)),
        batch.heads(np.concatenate([up[..., :nope], shared], -1)),
        batch.heads(up[..., nope:]),
        c.ops.softmax_scale(cfg, c.choices),
        batch.allowed,
    )
    flat = batch.tokens(out).reshape(tokens, heads * cfg.v_head_dim)  # (T, H Wv)
    y, o_saved = ops.linear.forward(c.at("o_proj"), ar.operand("o_proj.in", flat))
    probes = (c.probe(q_pe), c.probe(k_pe))
    saved = Saved(
        query_saved,
        kv_a_saved,
        norm_saved,
        kv_b_saved,
        *probes,
        attention_saved,
        c.probe(flat),
        o_saved,
        c.probe(y),
    )
    return y, saved


def backward(c: Context, dy: Array, saved: Saved, batch: Batch, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D)."""
    ops, cfg = c.ops, c.config
    tokens, heads, nope = dy.shape[0], cfg.num_attention_heads, cfg.qk_nope_head_dim
    dflat = ops.linear.backward(c.at("o_proj"), c.joined(dy), saved.o_proj, grads)  # (T, H Wv)
    dout = batch.heads(c.joined(dflat, "heads").reshape(tokens, heads, cfg.v_head_dim))
    scale = c.ops.softmax_scale(cfg, c.choices)
    dquery, dkey, dvalue = map(batch.tokens, ops.attention.backward(c, dout, saved.attended, scale))
    dq_pe = ops.rope.backward(c, c.joined(dquery[..., nope:], "q_pe"), batch.tables)  # (T, H, R)
    dk_pe = c.joined(c.ar.sum(dkey[..., nope:], 1)[:, None], "k_pe")  # (T, 1, R)  summed over heads
    dk_pe = ops.rope.backward(c, dk_pe, batch.tables)[:, 0]  # (T, R)
    dup = np.concatenate([dkey[..., :nope], dvalue], -1).reshape(tokens, -1)  # (T, H (nope + Wv))
    dlatent = ops.linear.backward(c.at("kv_b_proj"), dup, saved.kv_b_proj, grads)  # (T, C)
    dlatent = ops.norm.backward(c.at("kv_a_layernorm"), dlatent, saved.kv_a_layernorm, grads)
    ddown = np.concatenate([dlatent, dk_pe], -1)  # (T, C + R)
    dx = ops.linear.backward(c.at("kv_a_proj_with_mqa"), ddown, saved.kv_a_proj, grads)
    dq = np.concatenate([dquery[..., :nope], dq_pe], -1).reshape(tokens, -1)
    return c.ar.at("d.self_attn.in", _query_backward(c, dq, saved.query, grads) + dx)  # (T, D)


def _query(c: Context, hidden: Operand) -> tuple[Array, QuerySaved]:
    """hidden (T, D)  ->  (T, H (nope + R))."""
    if c.config.q_lora_rank is None:
        query, saved = c.ops.linear.forward(c.at("q_proj"), hidden)
        return query, QuerySaved(None, None, None, saved)
    down, a_saved = c.ops.linear.forward(c.at("q_a_proj"), hidden)  # (T, q latent)
    latent, norm_saved = c.ops.norm.forward(c.at("q_a_layernorm"), down, c.choices.norm_epsilon(c.config))
    query, b_saved = c.ops.linear.forward(c.at("q_b_proj"), c.ar.operand("q_b_proj.in", latent))
    return query, QuerySaved(a_saved, norm_saved, b_saved, None)


def _query_backward(c: Context, dq: Array, saved: QuerySaved, grads: Gradients) -> Array:
    """dq (T, H (nope + R))  ->  dx (T, D)."""
    linear_backward = c.ops.linear.backward
    if c.config.q_lora_rank is None:
        dx: Array = linear_backward(c.at("q_proj"), dq, saved.q_proj, grads)
        return dx
    dlatent = linear_backward(c.at("q_b_proj"), dq, saved.q_b_proj, grads)
    ddown = c.ops.norm.backward(c.at("q_a_layernorm"), dlatent, saved.q_a_layernorm, grads)
    dx = linear_backward(c.at("q_a_proj"), ddown, saved.q_a_proj, grads)
    return dx
