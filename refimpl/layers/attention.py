"""Causal softmax attention over heads.  SPEC MLA-6 to MLA-9.

s = scale q k^T;  p = softmax of s over the allowed keys;  o = p v.
Backward: dp = do v^T, ds = p (dp - <dp, p>), dq = scale ds k, dk = scale ds^T q, dv = p^T do.
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array, Dropped, Kept


@dataclass(frozen=True)
class Saved:
    query: Kept  # (B, H, S, W)
    key: Kept  # (B, H, S, W)
    value: Kept  # (B, H, S, Wv)
    scores: Array | None = tensor("scores", per_token=False)  # (B, H, S, S)  -inf where masked
    probs: Kept = tensor("probs", per_token=False)  # (B, H, S, S)
    softmax: Array | None = None  # (B, H, S, S)  the same before its cast, where backward reads that


def forward(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, Saved]:
    """query, key (B, H, S, W), value (B, H, S, Wv), allowed (B or 1, 1, S, S)  ->  (B, H, S, Wv)."""
    ar = c.ar
    query = ar.at("attention.query", query)  # some scale it here, and store it
    products = ar.fused("attention.products", ar.matmul(query, key))  # (B, H, S, S)
    scores = ar.at("attention.scores", products * scale)
    scores = np.where(allowed, scores, -np.inf)
    softmax = ar.fused("attention.softmax", ar.softmax(scores))  # (B, H, S, S)  masked keys give exactly 0
    probs = ar.at("attention.probs", softmax)
    out = ar.at("attention.out", ar.matmul(probs, value.swapaxes(-1, -2)))  # (B, H, S, Wv)
    kept = (
        ar.keep("attention.query", query),
        ar.keep("attention.key", key),
        ar.keep("attention.value", value),
    )
    before = softmax if ar.reads_source("attention.probs") else None
    return out, Saved(*kept, c.probe(scores), c.keep("attention.probs", probs), before)


def backward(c: Context, dout: Array, saved: Saved, scale: float) -> tuple[Array, Array, Array]:
    """dout (B, H, S, Wv)  ->  dquery, dkey (B, H, S, W), dvalue (B, H, S, Wv)."""
    ar, probs = c.ar, saved.probs.value()  # (B, H, S, S)
    dprobs = c.joined(
        ar.at("d.attention.probs", ar.matmul(dout, saved.value.value())), "probs"
    )  # (B, H, S, S)
    softmax = probs if saved.softmax is None else saved.softmax
    dsoftmax = ar.fused("d.attention.softmax", ar.dsoftmax(softmax, dprobs))  # (B, H, S, S)
    dscores = ar.at("d.attention.scores", dsoftmax * scale)
    dquery = ar.at("d.attention.query", ar.matmul(dscores, saved.key.value().swapaxes(-1, -2)))
    dkey = ar.at("d.attention.key", ar.matmul(dscores.swapaxes(-1, -2), saved.query.value().swapaxes(-1, -2)))
    dvalue = ar.at("d.attention.value", ar.matmul(probs.swapaxes(-1, -2), dout.swapaxes(-1, -2)))
    return dquery, dkey, dvalue


def again(saved: Saved, computed: Saved) -> Saved:
    """With what was not kept taken from what was computed again."""
    missing = {
        name: getattr(computed, name)
        for name in ("query", "key", "value", "probs")
        if isinstance(getattr(saved, name), Dropped)
    }
    return replace(saved, **missing)
