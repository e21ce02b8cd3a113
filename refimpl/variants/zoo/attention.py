"""Attention computed in other ways.  SPEC MLA-6 to MLA-9."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refimpl.layers import attention
from refimpl.layers.context import Context, Op
from refimpl.numerics import functions
from refimpl.numerics.arithmetic import Array, Kept
from refimpl.variants.variation import Change, operations

LN2 = float(functions.log(np.float64(2.0)))
LOG2_E = 1.0 / LN2
TILE = 8  # keys of a block: none of the cases has as few, so that every row has several


def _swap(x: Array) -> Array:
    return x.swapaxes(-1, -2)


# The scale goes into the query, once for all keys.


def _scaled_forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, attention.Saved]:
    query = c.ar.at("attention.query", query * scale)
    return attention.forward(c, query, key, value, 1.0, allowed)


def _scaled_backward(
    c: Context, dout: Array, saved: attention.Saved, scale: float
) -> tuple[Array, Array, Array]:
    dquery, dkey, dvalue = attention.backward(c, dout, saved, 1.0)
    return c.ar.at("d.attention.query", dquery * scale), dkey, dvalue


QUERY_SCALED: Change = operations(attention=lambda ops: Op(_scaled_forward, _scaled_backward))


# exp(x) = 2^(x log2 e), with the factor in the scale.


def _exp2_forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, attention.Saved]:
    ar = c.ar
    products = ar.matmul(query, key)  # (B, H, S, S)
    scores = np.where(allowed, products * scale, -np.inf)
    x = np.where(allowed, products * (scale * LOG2_E), -np.inf)
    x = x - ar.max(x)[..., None]
    e = ar.array(functions.exp(x.astype(np.float64) * LN2))  # 2^x
    probs = ar.at("attention.probs", e * (1.0 / ar.sum(e)[..., None]))
    out = ar.at("attention.out", ar.matmul(probs, _swap(value)))
    kept = (ar.keep("attention.query", query), ar.keep("attention.key", key))
    value_kept = ar.keep("attention.value", value)
    return out, attention.Saved(*kept, value_kept, c.probe(scores), ar.keep("attention.probs", probs))


EXP2: Change = operations(attention=lambda ops: Op(_exp2_forward, attention.backward))


# FlashAttention: blocks of keys with a running maximum and sum; backward from the logarithm of the sum, and
# with <do, o> in place of <dp, p>.


@dataclass(frozen=True)
class Flash:
    query: Kept
    key: Kept
    value: Kept
    out: Array  # (B, H, S, Wv)
    log_sum: Array  # (B, H, S, 1)
    allowed: Array


def _flash_forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, Flash]:
    ar = c.ar
    shape = (*query.shape[:-1], 1)
    total, out = ar.zeros(shape), ar.zeros((*query.shape[:-1], value.shape[-1]))
    largest = np.full_like(total, -np.inf)
    for at in range(0, key.shape[-2], TILE):
        own = slice(at, at + TILE)
        scores = np.where(allowed[..., own], ar.matmul(query, key[..., own, :]) * scale, -np.inf)
        top = np.maximum(largest, ar.max(scores)[..., None])
        safe = np.where(np.isinf(top), 0.0, top).astype(top.dtype)  # rows that have seen no key yet
        e, kept = ar.exp(scores - safe), ar.exp(largest - safe)
        total = total * kept + ar.sum(e)[..., None]
        out = out * kept + ar.matmul(e, _swap(value[..., own, :]))
        largest = top
    out = ar.at("attention.out", out / total)
    kept_parts = (ar.keep("attention.query", query), ar.keep("attention.key", key))
    return out, Flash(*kept_parts, ar.keep("attention.value", value), out, largest + ar.log(total), allowed)


def _flash_backward(c: Context, dout: Array, saved: Flash, scale: float) -> tuple[Array, Array, Array]:
    ar, query, key = c.ar, saved.query.value(), saved.key.value()
    scores = np.where(saved.allowed, ar.matmul(query, key) * scale, -np.inf)
    probs = ar.exp(scores - saved.log_sum)  # recomputed
    rows = ar.dot(dout, saved.out)[..., None]
    dscores = probs * (ar.matmul(dout, saved.value.value()) - rows)
    dquery = ar.at("d.attention.query", ar.matmul(dscores, _swap(key)) * scale)
    dkey = ar.at("d.attention.key", ar.matmul(_swap(dscores), _swap(query)) * scale)
    return dquery, dkey, ar.at("d.attention.value", ar.matmul(_swap(probs), _swap(dout)))


FLASH: Change = operations(attention=lambda ops: Op(_flash_forward, _flash_backward))


# Only the backward of FlashAttention: sum of do * o over a row.


@dataclass(frozen=True)
class WithOut(attention.Saved):
    result: Array | None = None


def _kept_forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, WithOut]:
    out, s = attention.forward(c, query, key, value, scale, allowed)
    return out, WithOut(s.query, s.key, s.value, s.scores, s.probs, s.softmax, out)


def _rows_backward(c: Context, dout: Array, saved: WithOut, scale: float) -> tuple[Array, Array, Array]:
    ar, probs = c.ar, saved.probs.value()
    assert saved.result is not None
    dprobs = ar.matmul(dout, saved.value.value())
    rows = ar.dot(dout, saved.result)[..., None]
    dscores = ar.at("d.attention.scores", probs * (dprobs - rows) * scale)
    dquery = ar.at("d.attention.query", ar.matmul(dscores, _swap(saved.key.value())))
    dkey = ar.at("d.attention.key", ar.matmul(_swap(dscores), _swap(saved.query.value())))
    return dquery, dkey, ar.at("d.attention.value", ar.matmul(_swap(probs), _swap(dout)))


ROW_SUMS: Change = operations(attention=lambda ops: Op(_kept_forward, _rows_backward))


# The sum of exponentials divides after the product with the values.


def _late_forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, attention.Saved]:
    ar = c.ar
    scores = ar.at("attention.scores", ar.matmul(query, key) * scale)
    scores = np.where(allowed, scores, -np.inf)
    e = ar.exp(scores - ar.max(scores)[..., None])
    total = ar.sum(e)[..., None]
    out = ar.at("attention.out", ar.matmul(e, _swap(value)) / total)
    _, saved = attention.forward(c, query, key, value, scale, allowed)
    probs = ar.at("attention.probs", e / total)
    return out, replace(saved, scores=c.probe(scores), probs=ar.keep("attention.probs", probs))


LATE_DIVISION: Change = operations(attention=lambda ops: Op(_late_forward, attention.backward))
