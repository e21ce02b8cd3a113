"""Cross-entropy on the targets that count.  SPEC LOSS-1 to LOSS-3.

nll[t] = log sum_v exp(z[t, v] - max_v z[t, v]) - (z[t, target[t]] - max_v z[t, v]);  loss = sum_t nll[t] / n
dz[t, v] = (softmax(z[t])[v] - [v = target[t]]) dloss / n, and 0 for a token whose target is -100.
n is the global count of targets, known before the backward pass.
"""

from dataclasses import dataclass

import numpy as np

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array

IGNORED = -100


@dataclass(frozen=True)
class Saved:
    rows: Array  # (M,) tokens that have a target
    targets: Array  # (M,) their targets
    exps: Array  # (M, V)
    sums: Array  # (M, 1)
    count: int  # n
    shape: tuple[int, ...]  # (T, V) of the logits
    nll: Array = tensor("loss.nll", per_token=False)  # (M,)


def forward(c: Context, logits: Array, targets: Array, count: int) -> tuple[Array, Saved]:
    """logits (T, V), targets (T,) int with -100 for none, count n  ->  loss ()."""
    ar, rows = c.ar, np.flatnonzero(targets != IGNORED)
    chosen = targets[rows]
    z = logits[rows]  # (M, V)
    z = z - ar.max(z)[:, None]
    exps = ar.exp(z)  # (M, V)
    sums = ar.sum(exps)[:, None]  # (M, 1)
    nll = ar.log(sums[:, 0]) - z[np.arange(len(rows)), chosen]  # (M,)
    return ar.sum(nll) / count, Saved(rows, chosen, exps, sums, count, logits.shape, nll)


def backward(c: Context, dloss: float, saved: Saved) -> Array:
    """dloss ()  ->  dlogits (T, V)."""
    own = saved.exps / saved.sums  # (M, V)
    own[np.arange(len(saved.rows)), saved.targets] -= 1.0
    dlogits = c.ar.zeros(saved.shape)
    dlogits[saved.rows] = own * (dloss / saved.count)
    return c.ar.at("d.logits", dlogits)
