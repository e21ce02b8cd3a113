"""Orders and metrics of schedules that are wrong on purpose.  SPEC CASE-18."""

from __future__ import annotations

from typing import Final

import numpy as np

from refimpl.cases.format import Tensor
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.arrays import PER_DURATIONS

WRONG: Final = ("ranks", "swapped", "next")


def spoiled(right: Array, t: Tensor) -> dict[str, Array]:
    """name -> an output that is wrong: every rank's numbers on the next rank, two neighbours that differ
    exchanged, all numbers one more, zeros."""
    ranks = 1 if t.name in PER_DURATIONS else 0
    found = {"zeros": np.zeros_like(right), "next": right + 1, "swapped": _swapped(right, t.name)}
    if right.ndim > ranks:
        found["ranks"] = np.roll(right, 1, ranks)
    return found


def _swapped(right: Array, name: str) -> Array:
    """Entries of an order are rows; of everything else numbers are."""
    made = right.copy()
    rows = made.reshape(-1, right.shape[-1] if name == "order" else 1)
    differ = np.flatnonzero((rows[1:] != rows[:-1]).any(-1))
    if differ.size:
        first = int(differ[0])
        rows[[first, first + 1]] = rows[[first + 1, first]]
    return made
