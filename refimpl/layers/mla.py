"""Multi-head latent attention, naive form.  SPEC MLA-1 to MLA-5; report equations 1 to 11.

c_q = norm(q_a x);  [q_nope; q_pe] = q_b c_q per head            (or one q_proj, without the query latent)
[c_raw; k_pe] = kv_a x;  c_kv = norm(c_raw);  [k_nope; v] = kv_b c_kv per head
q = [q_nope; rope(q_pe)], k = [k_nope; rope(k_pe), shared by all heads];  u = o_proj [o_1; ...; o_H]
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.layers import attention, linear, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics import sites
from refimpl.numerics.arithmetic import Array, Kept, Operand
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
    rope_in: Kept | None = None  # (T, 1, R)  the shared key part before its rotation, to compute keys again


@dataclass(frozen=True)
class Up:
    """From the latents to attention: what V3's training computes again in backward."""

    q_b_proj: linear.Saved | None
    q_a_layernorm: norm.Saved | None
    kv_a_layernorm: norm.Saved
    kv_b_proj: linear.Saved
    q_pe: Array  # (T, H, R)
    k_pe: Array  # (T, 1, R)
    query: Array  # (B, H, S, W)
    key: Array  # (B, H, S, W)
    value: Array  # (B, H, S, Wv)

    def saved_query(self, first: linear.Saved) -> QuerySaved:
        return query_saved(first, self.q_a_layernorm, self.q_b_proj)


def forward(c: Context, x: Array, batch: Batch) -> tuple[Array, Saved]:
    """x (T, D), already normalised  ->  (T, D)."""
    ar, ops, cfg = c.ar, c.ops, c.config
    tokens = x.shape[0]
    hidden = ar.operand("self_attn.in", x)  # (T, D)  read by q_a (or q) and kv_a
    query, first = query_down(c, hidden)  # (T, q latent), or (T, H (nope + R)) without one
    down, kv_a_saved = ops.linear.forward(c.at("kv_a_proj_with_mqa"), hidden)  # (T, C + R)
    latent, k_pe = down[:, : cfg.kv_lora_rank], down[:, None, cfg.kv_lora_rank :]  # (T, C), (T, 1, R)
    up = _up(c, query, latent, k_pe, batch)
    scale = ops.softmax_scale(cfg, c.choices)
    out, attended = ops.attention.forward(c, up.query, up.key, up.value, scale, batch.allowed)
    flat = batch.tokens(out).reshape(tokens, cfg.num_attention_heads * cfg.v_head_dim)  # (T, H Wv)
    y, o_saved = ops.linear.forward(c.at("o_proj"), ar.operand("o_proj.in", flat))
    saved = Saved(
        up.saved_query(first),
        kv_a_saved,
        up.kv_a_layernorm,
        up.kv_b_proj,
        c.probe(up.q_pe),
        c.probe(up.k_pe),
        attended,
        c.probe(flat),
        o_saved,
        c.probe(y),
        ar.keep("rope.in", k_pe) if ar.recomputes(*sites.UP) else None,
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
    dk_pe = c.ar.fused("d.rope.out", c.ar.sum(dkey[..., nope:], 1))  # (T, R)  summed over heads
    dk_pe = c.joined(dk_pe[:, None], "k_pe")  # (T, 1, R)
    dk_pe = ops.rope.backward(c, dk_pe, batch.tables)[:, 0]  # (T, R)
    dup = np.concatenate([dkey[..., :nope], dvalue], -1).reshape(tokens, -1)  # (T, H (nope + Wv))
    dlatent = ops.linear.backward(c.at("kv_b_proj"), dup, saved.kv_b_proj, grads)  # (T, C)
    dlatent = ops.norm.backward(c.at("kv_a_layernorm"), dlatent, saved.kv_a_layernorm, grads)
    ddown = np.concatenate([dlatent, dk_pe], -1)  # (T, C + R)
    dx = ops.linear.backward(c.at("kv_a_proj_with_mqa"), ddown, saved.kv_a_proj, grads)
    dq = np.concatenate([dquery[..., :nope], dq_pe], -1).reshape(tokens, -1)
    return c.ar.at("d.self_attn.in", _query_backward(c, dq, saved.query, grads) + dx)  # (T, D)


def again(c: Context, saved: Saved, x: Array | None, batch: Batch) -> Saved:
    """With what was not kept computed again, from the latents and from x (T, D), the module's input, which is
    needed where the operand made of it was not kept."""
    ar, query, kv_a_proj = c.ar, saved.query, saved.kv_a_proj
    keeping = replace(c, ar=ar.keeping, probing=False)
    if ar.recomputes("self_attn.in"):
        assert x is not None  # whoever made the operand of it gives it again
        hidden = keeping.ar.operand("self_attn.in", x)
        kv_a_proj = linear.again(kv_a_proj, hidden)
        query = _first_again(query, hidden)
    saved = replace(saved, query=query, kv_a_proj=kv_a_proj)
    if not ar.recomputes(*sites.UP):
        return saved
    assert saved.rope_in is not None
    latent, k_pe = saved.kv_a_layernorm.x.value(), saved.rope_in.value()
    up = _up(keeping, _query_kept(keeping, query), latent, k_pe, batch)
    scale = c.ops.softmax_scale(c.config, c.choices)
    _, attended = c.ops.attention.forward(keeping, up.query, up.key, up.value, scale, batch.allowed)
    if query.q_b_proj is not None and up.q_b_proj is not None:
        query = replace(query, q_b_proj=linear.again(query.q_b_proj, up.q_b_proj.operand))
    kv_b_proj = linear.again(saved.kv_b_proj, up.kv_b_proj.operand)
    attended = attention.again(saved.attended, attended)
    return replace(saved, query=query, kv_b_proj=kv_b_proj, attended=attended)


def query_down(c: Context, hidden: Operand) -> tuple[Array, linear.Saved]:
    """hidden (T, D)  ->  (T, q latent), or (T, H (nope + R)) for a model without a query latent."""
    first = "q_proj" if c.config.q_lora_rank is None else "q_a_proj"
    y, saved = c.ops.linear.forward(c.at(first), hidden)
    return y, saved


def query_up(c: Context, query: Array) -> tuple[Array, norm.Saved | None, linear.Saved | None]:
    """What `query_down` gives  ->  (T, H, nope + R)."""
    q_norm = q_b = None
    if c.config.q_lora_rank is not None:
        query, q_norm = c.ops.norm.forward(c.at("q_a_layernorm"), query, c.choices.norm_epsilon(c.config))
        query, q_b = c.ops.linear.forward(c.at("q_b_proj"), c.ar.operand("q_b_proj.in", query))
    return query.reshape(len(query), c.config.num_attention_heads, -1), q_norm, q_b


def query_saved(first: linear.Saved, q_norm: norm.Saved | None, q_b: linear.Saved | None) -> QuerySaved:
    return QuerySaved(None, None, None, first) if q_norm is None else QuerySaved(first, q_norm, q_b, None)


def _up(c: Context, query: Array, latent: Array, k_pe: Array, batch: Batch) -> Up:
    """query as `query_down` gives it, latent (T, C), k_pe (T, 1, R)."""
    ar, ops, cfg = c.ar, c.ops, c.config
    nope = cfg.qk_nope_head_dim
    query, q_norm, q_b = query_up(c, query)
    latent, kv_norm = ops.norm.forward(c.at("kv_a_layernorm"), latent, c.choices.norm_epsilon(cfg))
    up, kv_b = ops.linear.forward(c.at("kv_b_proj"), ar.operand("kv_b_proj.in", latent))
    up = up.reshape(len(up), cfg.num_attention_heads, nope + cfg.v_head_dim)  # per head: key rows, value rows
    q_pe = ops.rope.forward(c, query[..., nope:], batch.tables)  # (T, H, R)
    k_pe = ops.rope.forward(c, k_pe, batch.tables)  # (T, 1, R)
    shared = np.broadcast_to(k_pe, q_pe.shape)  # (T, H, R)  one key part for all heads
    q = batch.heads(np.concatenate([query[..., :nope], q_pe], -1))
    k = batch.heads(np.concatenate([up[..., :nope], shared], -1))
    return Up(q_b, q_norm, kv_norm, kv_b, q_pe, k_pe, q, k, batch.heads(up[..., nope:]))


def _query_kept(c: Context, saved: QuerySaved) -> Array:
    """What `query_down` gave.  Without a latent it is the query, and not kept: its product is done again."""
    if saved.q_a_layernorm is not None:
        return saved.q_a_layernorm.x.value()
    assert saved.q_proj is not None
    return query_down(c, saved.q_proj.operand)[0]


def _first_again(saved: QuerySaved, hidden: Operand) -> QuerySaved:
    if saved.q_proj is not None:
        return replace(saved, q_proj=linear.again(saved.q_proj, hidden))
    assert saved.q_a_proj is not None
    return replace(saved, q_a_proj=linear.again(saved.q_a_proj, hidden))


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
