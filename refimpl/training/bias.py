"""Balancing without an auxiliary loss: the selection bias after a step.  SPEC BIAS-3; report section 2.1.2.

bias[i] += speed * sign(mean(load) - load[i]), with the load of the whole batch, padding left out.  An expert
of exactly mean load is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.numerics.arithmetic import Arithmetic, Array


def update(ar: Arithmetic, bias: Array, counts: Sequence[Array], speed: float) -> Array:
    """bias (N,), counts (B, N) int of each microbatch  ->  (N,).  The sign is the integer sum - N load's."""
    load = np.concatenate(counts).sum(0)  # (N,)
    sign = np.sign(load.sum() - load.size * load)
    return ar.at("optim.bias", bias + speed * ar.array(sign))
