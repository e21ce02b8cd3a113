"""The rows that a rank sends, receives and computes, in the order of public kernels.  SPEC XPAR-6, XPAR-7.

A row stands for a token at one of its experts and is named by its place in the (T, K) slots, token K + k.
Every order here is made of the destination, then the source rank, then the token:

    sent       by destination rank and local expert, as Megatron's `permute` leaves them for the all-to-all
    received   a token once per rank, by source rank and token, as DeepEP's normal kernels hand them over
    arrived    by source rank, then local expert: Megatron's rows after the all-to-all
    computed   by local expert, then source rank: the rows of the grouped GEMM
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.expert_parallel.dispatch import Dispatch


@dataclass(frozen=True)
class Rows:
    """Rows in their order: slots (n,); chosen is K; parts says how many rows each run has."""

    slots: Array  # (n,)
    chosen: int
    parts: Array  # (R,) by rank, (E,) by local expert, or (R, E) by both: runs in C order

    @property
    def tokens(self) -> Array:
        """(n,) the token of each row."""
        return self.slots // self.chosen

    def runs(self) -> list[Array]:
        """The slots of each run."""
        ends = _ends(self.parts)
        return [
            self.slots[end - count : end] for end, count in zip(ends, self.parts.reshape(-1), strict=True)
        ]


@dataclass(frozen=True)
class Received:
    """The tokens of a rank, each once."""

    tokens: Array  # (n,)
    slots: Array  # (n, K) the slots of the token that are of this rank's experts, -1 for the others
    experts: Array  # (n, K) their local experts, -1 for the others.  DeepEP: recv_topk_idx
    per_source: Array  # (R,) how many came from each rank


def sent(plan: Dispatch, rank: int) -> Rows:
    """What a rank sends; parts (R,) are the input splits of its all-to-all."""
    slots = _slots_of(plan, np.flatnonzero(plan.source == rank))
    target, local = plan.target.reshape(-1)[slots], plan.placement.local[plan.idx.reshape(-1)[slots]]
    parts = np.bincount(target, minlength=plan.placement.ranks)
    return Rows(slots[np.lexsort((slots, local, target))], plan.idx.shape[1], parts)


def received(plan: Dispatch, rank: int) -> Received:
    """The tokens that a rank has after the dispatch."""
    tokens = np.flatnonzero(plan.in_rank[:, rank])
    tokens = tokens[np.lexsort((tokens, plan.source[tokens]))]
    here = plan.target[tokens] == rank  # (n, K)
    slots = tokens[:, None] * plan.idx.shape[1] + np.arange(plan.idx.shape[1])
    local = plan.placement.local[plan.idx[tokens]]
    return Received(tokens, np.where(here, slots, -1), np.where(here, local, -1), plan.to_rank[:, rank])


def arrived(plan: Dispatch, rank: int) -> Rows:
    """The rows of a rank as the all-to-all leaves them; parts (R, E): the output splits are sums over E."""
    slots, source, local = _here(plan, rank)
    held = len(plan.placement.held[rank])
    cells = np.bincount(source * held + local, minlength=plan.placement.ranks * held)
    order = np.lexsort((slots, local, source))
    return Rows(slots[order], plan.idx.shape[1], cells.reshape(plan.placement.ranks, held))


def computed(plan: Dispatch, rank: int) -> Rows:
    """The rows of a rank's grouped GEMM; parts (E,) are the tokens of its experts."""
    slots, source, local = _here(plan, rank)
    parts = np.bincount(local, minlength=len(plan.placement.held[rank]))
    return Rows(slots[np.lexsort((slots, source, local))], plan.idx.shape[1], parts)


def inverse(rows: Rows, slots: int) -> Array:
    """(slots,) the row of each slot, -1 for a slot that has no row here."""
    found = np.full(slots, -1)
    found[rows.slots] = np.arange(len(rows.slots))
    return found


def _here(plan: Dispatch, rank: int) -> tuple[Array, Array, Array]:
    """The slots of a rank's experts in ascending order, with their source ranks and local experts."""
    slots = np.flatnonzero(plan.target.reshape(-1) == rank)
    return slots, plan.source[slots // plan.idx.shape[1]], plan.placement.local[plan.idx.reshape(-1)[slots]]


def _slots_of(plan: Dispatch, tokens: Array) -> Array:
    chosen = plan.idx.shape[1]
    return np.asarray(tokens[:, None] * chosen + np.arange(chosen)).reshape(-1)


def _ends(parts: Array) -> list[int]:
    ends, end = [], 0
    for count in parts.reshape(-1).tolist():
        end += count
        ends.append(end)
    return ends
