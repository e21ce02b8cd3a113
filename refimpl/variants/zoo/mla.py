"""Latent attention computed in other ways.  SPEC MLA-1 to MLA-5, ROPE-6, MASK-2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.layers import linear, mla, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, Op, Ops, child, tensor
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.gradients import Gradients
from refimpl.programs import Setting
from refimpl.variants.variation import Change, both, configured, operations, stored

SHIFT = 5  # positions

# q_a and kv_a as one matrix: a row of the input's gradient is one sum over both.


def _fused_backward(
    c: Context, dy: Array, saved: mla.Saved, batch: Batch, grads: Gradients, ops: Ops
) -> Array:
    if c.config.q_lora_rank is None:
        q_name, q_saved = "q_proj", saved.query.q_proj
    else:
        q_name, q_saved = "q_a_proj", saved.query.q_a_proj
    assert q_saved is not None
    seen: dict[str, Array] = {}

    def waiting(inner: Context, dy: Array, own: linear.Saved, to: Gradients) -> Array:
        if inner.leaf not in (q_name, "kv_a_proj_with_mqa"):
            dx: Array = ops.linear.backward(inner, dy, own, to)
            return dx
        out = inner.ar.operand(f"{inner.linear}.dy", inner.joined(dy))
        to.weight(inner.name("weight"), inner.microbatch, out, own.operand)
        seen[inner.leaf] = out.value
        if len(seen) < 2:
            return inner.ar.zeros(own.operand.shape)
        names = (q_name, "kv_a_proj_with_mqa")
        both_dy = np.concatenate([seen[name] for name in names], -1)
        weights = np.concatenate([c.at(name).array("weight") for name in names])
        return inner.ar.at(f"{inner.linear}.dx", inner.ar.dgrad(Operand(both_dy), inner.ar.weight(weights)))

    inside = replace(c, ops=replace(c.ops, linear=Op(ops.linear.forward, waiting)))
    dx: Array = ops.mla.backward(inside, dy, saved, batch, grads)
    return dx


def _fused(ops: Ops) -> Op:
    return Op(
        ops.mla.forward, lambda c, dy, saved, batch, grads: _fused_backward(c, dy, saved, batch, grads, ops)
    )


FUSED_DOWN: Change = operations(mla=_fused)


# kv_b as a matrix for the keys and one for the values.


def _split(ops: Ops) -> Op:
    def backward(c: Context, dy: Array, saved: linear.Saved, grads: Gradients) -> Array:
        if c.leaf != "kv_b_proj":
            dx: Array = ops.linear.backward(c, dy, saved, grads)
            return dx
        cfg = c.config
        out = c.ar.operand(f"{c.linear}.dy", c.joined(dy))
        grads.weight(c.name("weight"), c.microbatch, out, saved.operand)
        keys = _key_rows(cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.v_head_dim)
        weight = c.array("weight")
        parts = [c.ar.dgrad(Operand(out.value[:, rows]), c.ar.weight(weight[rows])) for rows in (keys, ~keys)]
        return c.ar.at(f"{c.linear}.dx", parts[0] + parts[1])

    return Op(ops.linear.forward, backward)


def _key_rows(heads: int, nope: int, value: int) -> Array:
    return np.tile(np.arange(nope + value) < nope, heads)


SPLIT_UP: Change = operations(linear=_split)


# Absorbed: kv_b goes into the query and behind the sum over keys, and the latent is key and value.


@dataclass(frozen=True)
class Absorbed:
    query: mla.QuerySaved = child("")
    kv_a_proj: linear.Saved = child("kv_a_proj_with_mqa")
    kv_a_layernorm: norm.Saved = child("kv_a_layernorm")
    q_pe: Array | None = tensor("q_pe")
    k_pe: Array | None = tensor("k_pe")
    attended: Any = child("")
    heads: Array | None = tensor("heads")
    o_proj: linear.Saved = child("o_proj")
    out: Array | None = tensor("")
    q_nope: Array | None = None  # (H, T, nope)
    mixed: Array | None = None  # (H, T, C)  sums of latents


def _absorbed_forward(c: Context, x: Array, batch: Batch) -> tuple[Array, Absorbed]:
    ar, ops, cfg = c.ar, c.ops, c.config
    tokens, heads, nope, wide = x.shape[0], cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    hidden = ar.operand("self_attn.in", x)
    query, first = mla.query_down(c, hidden)
    query, q_norm, q_b = mla.query_up(c, query)
    down, kv_a_saved = ops.linear.forward(c.at("kv_a_proj_with_mqa"), hidden)
    eps = c.choices.norm_epsilon(cfg)
    latent, norm_saved = ops.norm.forward(c.at("kv_a_layernorm"), down[:, :wide], eps)
    q_pe = ops.rope.forward(c, query[..., nope:], batch.tables)
    k_pe = ops.rope.forward(c, down[:, None, wide:], batch.tables)
    keys, values = _halves(c)
    q_nope = query[..., :nope].swapaxes(0, 1)  # (H, T, nope)
    absorbed = ar.at("absorbed.query", ar.matmul(q_nope, keys.swapaxes(1, 2))).swapaxes(0, 1)  # (T, H, C)
    shared = np.concatenate([latent[:, None], k_pe], -1)  # (T, 1, C + R)
    shape = (tokens, heads, shared.shape[-1])
    z, attended = ops.attention.forward(
        c,
        batch.heads(np.concatenate([absorbed, q_pe], -1)),
        batch.heads(np.broadcast_to(shared, shape)),
        batch.heads(np.broadcast_to(latent[:, None], (tokens, heads, wide))),
        ops.softmax_scale(cfg, c.choices),
        batch.allowed,
    )
    mixed = batch.tokens(z).swapaxes(0, 1)  # (H, T, C)
    out = ar.at("absorbed.out", ar.matmul(mixed, values)).swapaxes(0, 1)  # (T, H, Wv)
    flat = out.reshape(tokens, -1)
    y, o_saved = ops.linear.forward(c.at("o_proj"), ar.operand("o_proj.in", flat))
    probes = (c.probe(q_pe), c.probe(k_pe))
    own = (
        mla.query_saved(first, q_norm, q_b),
        kv_a_saved,
        norm_saved,
        *probes,
        attended,
        c.probe(flat),
        o_saved,
        c.probe(y),
    )
    return y, Absorbed(*own, q_nope, mixed)


def _absorbed_backward(c: Context, dy: Array, saved: Absorbed, batch: Batch, grads: Gradients) -> Array:
    ar, ops, cfg = c.ar, c.ops, c.config
    tokens, heads, wide = dy.shape[0], cfg.num_attention_heads, cfg.kv_lora_rank
    assert saved.q_nope is not None
    assert saved.mixed is not None
    dflat = ops.linear.backward(c.at("o_proj"), c.joined(dy), saved.o_proj, grads)
    dout = c.joined(dflat, "heads").reshape(tokens, heads, cfg.v_head_dim).swapaxes(0, 1)  # (H, T, Wv)
    keys, values = _halves(c)
    dmixed = ar.at("d.absorbed.out", ar.matmul(dout, values.swapaxes(1, 2)))  # (H, T, C)
    dvalues = ar.matmul(dout.swapaxes(1, 2), saved.mixed.swapaxes(1, 2))  # (H, Wv, C)
    scale = ops.softmax_scale(cfg, c.choices)
    dz = batch.heads(dmixed.swapaxes(0, 1))
    dquery, dkey, dvalue = map(batch.tokens, ops.attention.backward(c, dz, saved.attended, scale))
    dabsorbed = dquery[..., :wide].swapaxes(0, 1)  # (H, T, C)
    dq_nope = ar.at("d.absorbed.query", ar.matmul(dabsorbed, keys)).swapaxes(0, 1)  # (T, H, nope)
    dkeys = ar.matmul(saved.q_nope.swapaxes(1, 2), dabsorbed.swapaxes(1, 2))  # (H, nope, C)
    # the gradient of kv_b is there already: one token for each of its rows
    dweight = np.concatenate([dkeys, dvalues], 1).reshape(-1, wide)
    one = Operand(ar.array(np.eye(len(dweight))))
    grads.weight(c.at("kv_b_proj").name("weight"), c.microbatch, one, Operand(dweight))
    dlatent = ar.sum(dkey[..., :wide] + dvalue, 1)  # (T, C)
    dlatent = ops.norm.backward(c.at("kv_a_layernorm"), dlatent, saved.kv_a_layernorm, grads)
    dq_pe = ops.rope.backward(c, c.joined(dquery[..., wide:], "q_pe"), batch.tables)
    dk_pe = c.joined(ar.sum(dkey[..., wide:], 1)[:, None], "k_pe")
    dk_pe = ops.rope.backward(c, dk_pe, batch.tables)[:, 0]
    ddown = np.concatenate([dlatent, dk_pe], -1)
    dx = ops.linear.backward(c.at("kv_a_proj_with_mqa"), ddown, saved.kv_a_proj, grads)
    dq = np.concatenate([dq_nope, dq_pe], -1).reshape(tokens, -1)
    return ar.at("d.self_attn.in", mla._query_backward(c, dq, saved.query, grads) + dx)


def _halves(c: Context) -> tuple[Array, Array]:
    """kv_b per head: keys (H, nope, C), values (H, Wv, C)."""
    cfg = c.config
    weight = c.at("kv_b_proj").array("weight").reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    return weight[:, : cfg.qk_nope_head_dim], weight[:, cfg.qk_nope_head_dim :]


ABSORBED: Change = operations(mla=lambda ops: Op(_absorbed_forward, _absorbed_backward))


# Halves in place of neighbouring pairs, in the weights and in the rotation.


def OTHER_LAYOUT(s: Setting) -> Setting:  # noqa: N802 - a change like the others
    if not s.config.rope_interleave:  # weights for halves are permuted already
        return s
    rope, per_head = s.config.qk_rope_head_dim, s.config.qk_head_dim
    order = np.arange(rope).reshape(-1, 2).T.reshape(-1)  # neighbours -> halves

    def permuted(width: int, at: Array) -> Any:
        def move(w: Array) -> Array:
            rows = w.reshape(-1, width, *w.shape[1:])
            first = rows[:, : width - rope]
            return np.concatenate([first, rows[:, width - rope :][:, at]], 1).reshape(w.shape)

        return move

    def layout(pattern: str, width: int) -> Change:
        return stored(pattern, permuted(width, order), permuted(width, np.argsort(order)))

    down = s.config.kv_lora_rank + rope
    return both(
        layout("*.q_b_proj.weight", per_head),
        layout("*.q_proj.weight", per_head),
        layout("*.kv_a_proj_with_mqa.weight", down),
        configured(rope_interleave=False),
    )(s)


# Positions that start elsewhere: only differences matter.

SHIFTED: Change = operations(tables=lambda ops: lambda c, positions: ops.tables(c, positions + SHIFT))
