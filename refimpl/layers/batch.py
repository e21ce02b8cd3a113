"""The tokens of a forward pass: which exist, where they stand, what they may see.  SPEC MASK-1 to MASK-4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.layers.balance import Balancing
from refimpl.layers.rope import Tables
from refimpl.numerics.arithmetic import Array

PADDING = -1


@dataclass(frozen=True)
class Inputs:
    """What a depth of the model is given, all (B, S)."""

    ids: Array
    segments: Array  # PADDING where a position does not exist
    positions: Array
    targets: Array | None

    @property
    def exists(self) -> Array:
        return np.not_equal(self.segments, PADDING)


@dataclass(frozen=True)
class Tokens:
    """What the units of one depth read: depth 0 is the main model, depth k is MTP module k, for which ids,
    positions, masks and targets are shifted together."""

    ids: Array  # (T,) int
    first: Array  # (T,) bool: the first position of its sequence
    exists: Array  # (T,) bool: not padding
    batch: Batch
    targets: Array | None = None  # (T,)
    balancing: Balancing | None = None


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens; layers see them as T = B * S rows."""

    size: int  # B
    length: int  # S
    tables: Tables  # cos, sin of every token's angles
    allowed: Array  # (B or 1, 1, S, S) bool: may query i see key j

    def heads(self, x: Array) -> Array:
        """(T, H, W)  ->  (B, H, S, W)."""
        return x.reshape(self.size, self.length, *x.shape[1:]).swapaxes(1, 2)

    def tokens(self, x: Array) -> Array:
        """(B, H, S, W)  ->  (T, H, W)."""
        swapped = x.swapaxes(1, 2)
        return swapped.reshape(self.size * self.length, *swapped.shape[2:])


def positions(segments: Array) -> Array:
    """segments (B, S)  ->  (B, S): how many earlier tokens of the same sequence have the same segment, so a
    packed document counts from 0, as it does alone."""
    return np.asarray(np.count_nonzero(_earlier(segments), -1))


def allowed(segments: Array) -> Array:
    """segments (B, S)  ->  (B, 1, S, S): keys that are no later than the query and in its segment.
    Padding is a segment of its own, so that every row has a key and none sees padding from outside."""
    own = np.eye(segments.shape[1], dtype=bool)
    return (_earlier(segments) | own)[:, None]


def _earlier(segments: Array) -> Array:
    before = np.tri(segments.shape[1], k=-1, dtype=bool)
    return np.asarray((segments[:, :, None] == segments[:, None, :]) & before)  # (B, S, S)
