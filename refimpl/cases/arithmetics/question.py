"""A fingerprint's question: the arithmetics that its inputs tell apart.  SPEC CASE-13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refimpl.cases.instruments import Data, Outputs


@dataclass(frozen=True)
class Alternative:
    """One arithmetic: its name, what it is, whether a port may have it, and its outputs."""

    name: str
    text: str
    allowed: bool
    compute: Callable[[Data], Outputs]


@dataclass(frozen=True)
class Question:
    """What a fingerprint asks."""

    note: str
    alternatives: Sequence[Alternative]
