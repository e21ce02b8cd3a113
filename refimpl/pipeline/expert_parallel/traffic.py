"""Bytes over the network between nodes and over the links inside of a node.  SPEC XPAR-12.

A row of the dispatch is a token in E4M3 with a float32 scale for each tile of 128 channels; a row of the
combine is bfloat16 (report section 3.3.3).  Both go the same ways, there and back, so a pass has as many rows
of each; the backward pass dispatches dy and combines dx and repeats them.  Expert numbers, weights and
counters, a hundred bytes for a token, are not counted, nor is what a rank keeps to itself.

The report's reason for M = 4 nodes: the links inside of a node have 160 / 50 = 3.2 times the network's
bandwidth, so that 3.2 experts of a token on a node (13 in all) cost no more time than one copy over the
network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.expert_parallel.dispatch import Dispatch

NETWORK = 50_000_000_000  # bytes a second of a rank's own InfiniBand card (report section 3.2.2)
INSIDE = 160_000_000_000  # and of its NVLink
TILE = 128


@dataclass(frozen=True)
class Copies:
    """Rows that leave a rank: (T, n) bool each, so that they can be counted by token and in all."""

    network: Array  # to another node
    inside: Array  # to another rank of the node

    @property
    def per_token(self) -> tuple[Array, Array]:
        """(T,) over the network, (T,) inside of nodes."""
        return np.count_nonzero(self.network, 1), np.count_nonzero(self.inside, 1)

    @property
    def total(self) -> tuple[int, int]:
        """Over the network, inside of nodes."""
        return int(np.count_nonzero(self.network)), int(np.count_nonzero(self.inside))


def once_per_node(plan: Dispatch) -> Copies:
    """V3's way: over the network once to each node, then forwarded inside of it."""
    return Copies(plan.over_network, plan.forwarded)


def once_per_rank(plan: Dispatch) -> Copies:
    """Straight to each rank that has one of the token's experts."""
    where = plan.placement
    ranks = np.arange(where.ranks)
    near = where.node_of(plan.source)[:, None] == where.node_of(ranks)  # (T, R)
    return Copies(plan.in_rank & ~near, plan.in_rank & near & (ranks != plan.source[:, None]))


def once_per_expert(plan: Dispatch) -> Copies:
    """Straight to each expert, as an all-to-all of permuted rows sends them."""
    where, source = plan.placement, plan.source[:, None]
    near = where.node_of(plan.target) == where.node_of(source)  # (T, K)
    return Copies(~near, near & (plan.target != source))


def as_deepep_counts(plan: Dispatch) -> Copies:
    """What DeepEP's tests divide by the time: every node and rank of a token, its own included."""
    return Copies(plan.in_node, plan.in_rank)


WAYS: dict[str, Callable[[Dispatch], Copies]] = {
    "once per node": once_per_node,
    "once per rank": once_per_rank,
    "once per expert": once_per_expert,
}


def fp8_row(width: int) -> int:
    """Bytes of a dispatched token: codes and scales."""
    return width + 4 * -(-width // TILE)


def bf16_row(width: int) -> int:
    """Bytes of a combined token."""
    return 2 * width


@dataclass(frozen=True)
class Loads:
    """(R,) rows that each rank sends and receives, tokens once per node."""

    network_out: Array
    network_in: Array
    inside_out: Array
    inside_in: Array


def loads(plan: Dispatch) -> Loads:
    """Where the rows of `once_per_node` leave and come in; forwarded rows leave the rank they landed on."""
    where = plan.placement
    token, node = np.nonzero(plan.over_network)
    passed, rank = np.nonzero(plan.forwarded)

    def count(at: Array) -> Array:
        return np.bincount(at, minlength=where.ranks)

    return Loads(
        count(plan.source[token]),
        count(plan.landing[token, node]),
        count(plan.landing[passed, where.node_of(rank)]),
        count(rank),
    )
