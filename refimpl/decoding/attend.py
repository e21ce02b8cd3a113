"""Attention of new queries on cached keys, whole or in parts of the keys.  SPEC DECODE-6, DECODE-7.

Of part p, the keys j in it that a query sees:
    lse[p] = m + log(sum_j exp(s_j - m)),  m = max_j s_j;      o[p] = sum_j softmax(s)_j v_j
    a part without such a key has lse = -inf and o = 0
and together:  o = sum_p softmax(lse)_p o[p]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.errors import Invalid
from refimpl.layers.context import Context
from refimpl.numerics.arithmetic import Array


def attend(
    c: Context,
    query: Array,
    key: Array,
    value: Array,
    scale: float,
    allowed: Array,
    parts: Sequence[slice] | None = None,
) -> Array:
    """query (H, N, W), key (H, S, W), value (H, S, Wv), allowed (N, S)  ->  (H, N, Wv).

    parts: slices of the keys that together are all of them, each once; None for the whole at once.
    """
    if parts is None or len(parts) == 1:
        whole: Array = c.ops.attention.forward(
            c, query[None], key[None], value[None], scale, allowed[None, None]
        )[0][0]
        return whole
    found = [
        partial(c, query, key[:, at], value[:, at], scale, np.ascontiguousarray(allowed[:, at]))
        for at in parts
    ]
    out, lse = (np.stack(arrays, -1) for arrays in zip(*found, strict=True))
    return c.ar.at("attention.out", merged(c, out, lse))


def partial(
    c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array
) -> tuple[Array, Array]:
    """query (H, N, W), key (H, S, W), value (H, S, Wv), allowed (N, S), some of the keys  ->  the output
    (H, N, Wv) of these keys alone and the logarithm (H, N) of their exponentials' sum."""
    ar, heads, queries = c.ar, len(query), query.shape[1]
    out, lse = ar.zeros((heads, queries, value.shape[-1])), ar.zeros((heads, queries))
    seeing = allowed.any(-1)  # (N,)  queries that see a key
    lse[:, ~seeing] = -np.inf
    if not seeing.any():
        return out, lse
    own = ar.at("attention.query", query[:, seeing])
    products = ar.fused("attention.products", ar.matmul(own, key))  # (H, n, S)
    scores = np.where(allowed[seeing], ar.at("attention.scores", products * scale), -np.inf)
    softmax = ar.fused("attention.softmax", ar.softmax(scores))
    probs = ar.at("attention.probs", softmax)
    out[:, seeing] = ar.at("attention.partial", ar.matmul(probs, value.swapaxes(-1, -2)))
    largest = ar.max(scores)  # (H, n)
    total = ar.sum(ar.exp(scores - largest[..., None]))
    lse[:, seeing] = ar.at("attention.lse", largest + ar.log(total))
    return out, lse


def merged(c: Context, out: Array, lse: Array) -> Array:
    """out (H, N, Wv, P), lse (H, N, P) of P parts  ->  (H, N, Wv).  Every query sees a key in some part."""
    weight = c.ar.softmax(lse)  # (H, N, P)  a part without keys has 0
    return c.ar.matmul(weight[..., None, :], out)[..., 0, :]


def split(length: int, size: int | None) -> list[slice] | None:
    """Keys 0 .. length - 1 in parts of `size`, counted from the first key; None for no split.

    Where a part ends depends on the key alone, so a query's output does not depend on the keys after it.
    """
    if size is None:
        return None
    if size < 1:
        raise Invalid(f"the size of a part of the keys is {size}, but it must be at least 1.")
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
