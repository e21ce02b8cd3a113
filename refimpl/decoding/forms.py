"""Latent attention of new tokens on caches, in both forms.  SPEC DECODE-4, DECODE-5.

naive:     [k_nope_h; v_h] = kv_b_h c_kv of every cached row;  s = scale [q_nope; q_pe] . [k_nope; k_pe]
absorbed:  a_h = K_h^T q_nope_h;  s = scale [a_h; q_pe] . [c_kv; k_pe];  z_h = sum_j p_j c_kv_j;
           o_h = V_h z_h
with kv_b_h = [K_h; V_h], P key rows and Wv value rows.  `scale` is the same in both: that of heads of width
P + R, whatever the width of the contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

import numpy as np

from refimpl.decoding.attend import attend, split
from refimpl.decoding.cache import Cache
from refimpl.layers import linear, mla, norm
from refimpl.layers.batch import Batch
from refimpl.layers.context import Context, Op, child, tensor
from refimpl.numerics.arithmetic import Array


@dataclass(frozen=True)
class Part:
    """The new tokens of one sequence: their rows among all new tokens, and its cache, with room for them."""

    at: slice
    cache: Cache

    @property
    def start(self) -> int:
        """The position of the first one."""
        return self.cache.length - int(self.at.stop - self.at.start)

    @property
    def allowed(self) -> Array:
        """(n, S) bool: a token sees those of its sequence up to itself."""
        keys = np.arange(self.cache.length)
        return np.asarray(keys <= np.arange(self.start, self.cache.length)[:, None])


@dataclass(frozen=True)
class Cached(Batch):
    """New tokens of several sequences, one after another in T rows."""

    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Saved:
    """Named tensors, all by new token; nothing goes backward from here."""

    query: mla.QuerySaved = child("")
    kv_a_proj: linear.Saved = child("kv_a_proj_with_mqa")
    kv_a_layernorm: norm.Saved = child("kv_a_layernorm")
    q_pe: Array | None = tensor("q_pe")  # (T, H, R)  rotated
    k_pe: Array | None = tensor("k_pe")  # (T, 1, R)  rotated
    absorbed: Array | None = tensor("absorbed_query")  # (T, H, C)  the absorbed form alone
    mixed: Array | None = tensor("mixed_latent")  # (T, H, C)  likewise: sums of latents
    heads: Array | None = tensor("heads")  # (T, H Wv)
    o_proj: linear.Saved = child("o_proj")
    out: Array | None = tensor("")  # (T, D)


# c, q_nope (T, H, P), q_pe (T, H, R), new tokens, split  ->  heads (T, H, Wv), absorbed query, mixed latent
Form = Callable[[Context, Array, Array, Cached, int | None], tuple[Array, Array | None, Array | None]]


def forward(form: Form, size: int | None, c: Context, x: Array, batch: Cached) -> tuple[Array, Saved]:
    """x (T, D), already normalised, of new tokens  ->  (T, D); their rows go into the caches first."""
    ar, ops, cfg = c.ar, c.ops, c.config
    nope, latent = cfg.qk_nope_head_dim, cfg.kv_lora_rank
    hidden = ar.operand("self_attn.in", x)
    query, first = mla.query_down(c, hidden)
    query, q_norm, q_b = mla.query_up(c, query)  # (T, H, P + R)
    down, kv_a = ops.linear.forward(c.at("kv_a_proj_with_mqa"), hidden)  # (T, C + R)
    eps = c.choices.norm_epsilon(cfg)
    c_kv, kv_norm = ops.norm.forward(c.at("kv_a_layernorm"), down[:, :latent], eps)
    q_pe = ops.rope.forward(c, query[..., nope:], batch.tables)  # (T, H, R)
    k_pe = ops.rope.forward(c, down[:, None, latent:], batch.tables)  # (T, 1, R)
    rows = np.concatenate([ar.at("cache.latent", c_kv), ar.at("cache.k_pe", k_pe[:, 0])], -1)  # (T, C + R)
    for part in batch.parts:
        part.cache.write(layer(c), part.start, rows[part.at])
    heads, absorbed, mixed = form(c, query[..., :nope], q_pe, batch, size)  # (T, H, Wv)
    flat = heads.reshape(len(x), -1)
    y, o_proj = ops.linear.forward(c.at("o_proj"), ar.operand("o_proj.in", flat))
    queries = mla.query_saved(first, q_norm, q_b)
    saved = Saved(
        queries,
        kv_a,
        kv_norm,
        c.probe(q_pe),
        c.probe(k_pe),
        absorbed,
        mixed,
        c.probe(flat),
        o_proj,
        c.probe(y),
    )
    return y, saved


def naive(
    c: Context, q_nope: Array, q_pe: Array, batch: Cached, size: int | None
) -> tuple[Array, None, None]:
    """Keys and values of every head, from kv_b and each cached row."""
    cfg, nope, latent = c.config, c.config.qk_nope_head_dim, c.config.kv_lora_rank
    query = np.concatenate([q_nope, q_pe], -1).swapaxes(0, 1)  # (H, T, P + R)
    scale, found = c.ops.softmax_scale(cfg, c.choices), []
    for part in batch.parts:
        rows = part.cache.rows(layer(c))  # (S, C + R)
        operand = c.ar.operand("kv_b_proj.in", rows[:, :latent])
        up = c.ops.linear.forward(c.at("kv_b_proj"), operand)[0].reshape(
            len(rows), cfg.num_attention_heads, -1
        )
        shared = np.broadcast_to(rows[:, None, latent:], (*up.shape[:2], cfg.qk_rope_head_dim))
        key = np.concatenate([up[..., :nope], shared], -1).swapaxes(0, 1)  # (H, S, P + R)
        value = up[..., nope:].swapaxes(0, 1)  # (H, S, Wv)
        parts = split(len(rows), size)
        found.append(attend(c, query[:, part.at], key, value, scale, part.allowed, parts))
    return np.concatenate(found, 1).swapaxes(0, 1), None, None


def absorbed(
    c: Context, q_nope: Array, q_pe: Array, batch: Cached, size: int | None
) -> tuple[Array, Array, Array]:
    """The latent is key and value of all heads, so heads are rows of one product."""
    ar, cfg, latent = c.ar, c.config, c.config.kv_lora_rank
    heads, tokens = cfg.num_attention_heads, len(q_nope)
    keys, values = halves(c)
    into = ar.matmul(q_nope.swapaxes(0, 1), keys.swapaxes(1, 2)).swapaxes(0, 1)  # (T, H, C)
    into = ar.at("absorbed.query", into)
    query = np.concatenate([into, q_pe], -1).reshape(1, tokens * heads, -1)  # (1, T H, C + R)
    scale, found = c.ops.softmax_scale(cfg, c.choices), []
    for part in batch.parts:
        rows = part.cache.rows(layer(c))[None]  # (1, S, C + R)
        own = query[:, part.at.start * heads : part.at.stop * heads]
        seen, parts = np.repeat(part.allowed, heads, 0), split(rows.shape[1], size)
        found.append(attend(c, own, rows, rows[..., :latent], scale, seen, parts)[0])
    mixed = np.concatenate(found).reshape(tokens, heads, latent)
    out = ar.matmul(mixed.swapaxes(0, 1), values).swapaxes(0, 1)  # (T, H, Wv)
    return ar.at("absorbed.out", out), into, mixed


def halves(c: Context) -> tuple[Array, Array]:
    """kv_b per head, of the attention at hand: key rows (H, P, C), value rows (H, Wv, C)."""
    cfg = c.config
    weight = c.at("kv_b_proj").array("weight").reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    return weight[:, : cfg.qk_nope_head_dim], weight[:, cfg.qk_nope_head_dim :]


def layer(c: Context) -> int:
    """The number of the layer, from the path of its attention."""
    return int(str(c.path).split(".")[2])


def _no_backward(*given: Any) -> NoReturn:
    raise AssertionError("attention on a cache has no backward pass")


FORMS: Final[dict[str, Form]] = {"naive": naive, "absorbed": absorbed}


def op(name: str, size: int | None) -> Op:
    """The attention of a decoder.  size: of the parts into which keys are split."""
    return Op(partial(forward, FORMS[name], size), _no_backward)
