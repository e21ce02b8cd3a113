"""Cross-entropy computed in other ways.  SPEC LOSS-2, LOSS-3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.layers.context import Context, Op, tensor
from refimpl.layers.loss import IGNORED
from refimpl.numerics.arithmetic import Array
from refimpl.variants.variation import Change, operations

CHUNK = 96  # columns of logits


@dataclass(frozen=True)
class Saved:
    rows: Array  # (M,)
    targets: Array  # (M,)
    z: Array  # (M, V)
    log_sum: Array  # (M, 1)  logarithm of the sum of exp z
    count: int
    like: Array
    nll: Array = tensor("loss.nll", per_token=False)


def _whole(c: Context, z: Array) -> Array:
    largest = c.ar.max(z)[:, None]
    return largest + c.ar.log(c.ar.sum(c.ar.exp(z - largest)))[:, None]


def _in_chunks(c: Context, z: Array) -> Array:
    """A running maximum and sum over chunks of the vocabulary."""
    ar = c.ar
    largest, total = np.full_like(z[:, :1], -np.inf), np.zeros_like(z[:, :1])
    for at in range(0, z.shape[-1], CHUNK):
        own = z[:, at : at + CHUNK]
        top = np.maximum(largest, ar.max(own)[:, None])
        total = total * ar.exp(largest - top) + ar.sum(ar.exp(own - top))[:, None]
        largest = top
    return largest + ar.log(total)


def _made(chunked: bool) -> Change:
    def forward(c: Context, logits: Array, targets: Array, count: int) -> tuple[Array, Saved]:
        ar, rows = c.ar, np.flatnonzero(targets != IGNORED)
        z, chosen = logits[rows], targets[rows]
        log_sum = _in_chunks(c, z) if chunked else _whole(c, z)
        nll = log_sum[:, 0] - z[np.arange(len(rows)), chosen]
        loss = ar.sum(nll) / count if chunked else ar.sum(nll / count)
        return loss, Saved(rows, chosen, z, log_sum, count, logits, nll)

    def backward(c: Context, dloss: float, saved: Saved) -> Array:
        """softmax = exp(z - log sum)."""
        own = c.ar.exp(saved.z - saved.log_sum)
        hot = np.zeros_like(own)
        hot[np.arange(len(saved.rows)), saved.targets] = 1.0
        dlogits = np.zeros_like(saved.like)
        dlogits[saved.rows] = (own - hot) * (dloss / saved.count)
        return c.ar.at("d.logits", dlogits)

    return operations(loss=lambda ops: Op(forward, backward))


LOG_SUM_EXP: Change = _made(chunked=False)
CHUNKED: Change = _made(chunked=True)
