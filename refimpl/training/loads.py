"""How evenly the experts are loaded.  SPEC BIAS-1, BIAS-2.

A load is an integer count of tokens; MaxVio = (max_i load_i - mean) / mean (Loss-Free Balancing, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from refimpl.numerics.arithmetic import Array

Loads = dict[int, Array]  # layer -> (N,) int


def add(parts: Iterable[Mapping[int, Array]]) -> Loads:
    """Counts of microbatches and ranks, (B, N) per layer  ->  those of the whole batch, (N,)."""
    total: Loads = {}
    for part in parts:
        for layer, counts in part.items():
            own = counts.sum(0)
            total[layer] = total[layer] + own if layer in total else own
    return total


def max_violation(load: Array) -> float:
    """(max - mean) / mean of (N,) counts; 0 when nothing was routed."""
    total = int(load.sum())
    return (int(load.max()) * load.size - total) / total if total else 0.0


def shares(load: Array) -> Array:
    """(..., N) counts  ->  each expert's share of the tokens' choices, 1 / N when all are equal."""
    total = load.sum(-1, keepdims=True)
    return np.asarray(load / np.maximum(total, 1))
