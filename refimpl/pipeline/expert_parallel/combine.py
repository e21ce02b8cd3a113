"""Results travel back to the token's own rank, and are summed there.  SPEC XPAR-9, XPAR-10.

BY_SLOTS    every expert's output comes back into its slot (T, K, D) and the sum over K is MOE-1's own: it
            depends neither on the ranks nor on the order in which results come in
IN_STAGES   what DeepEP sends: a rank adds up its experts' weighted outputs, a node its ranks' sums, the
            token's rank its nodes' sums, and each of these sums is stored ("experts.rank", "experts.node",
            "experts.out").  The same number in real arithmetic, rounded up to three times.  The gradients of
            the tokens come back in the same way ("d.experts.rank", "d.experts.node", "d.experts.in").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refimpl.layers import experts
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.pipeline.expert_parallel.dispatch import Dispatch


class Combine(NamedTuple):
    """How results become those of tokens; slots and dslots are (T, K, D), weight (T, K)."""

    forward: Callable[[Arithmetic, Dispatch, Array, Array], Array]  # slots, weight  ->  y (T, D)
    backward: Callable[[Arithmetic, Dispatch, Array], Array]  # dslots  ->  dx (T, D)


def _weighted(ar: Arithmetic, plan: Dispatch, slots: Array, weight: Array) -> Array:
    return ar.at("experts.out", experts.combined(ar, weight, slots, plan.idx))


def _summed(ar: Arithmetic, plan: Dispatch, dslots: Array) -> Array:
    order = experts.by_expert(plan.idx)
    return ar.at("d.experts.in", experts.added(ar, "d.experts.sum", dslots, order))


def _weighted_in_stages(ar: Arithmetic, plan: Dispatch, slots: Array, weight: Array) -> Array:
    sites = ("experts.rank", "experts.node", "experts.out")
    return _in_stages(ar, plan, slots * weight[:, :, None], sites)


def _summed_in_stages(ar: Arithmetic, plan: Dispatch, dslots: Array) -> Array:
    return _in_stages(ar, plan, dslots, ("d.experts.rank", "d.experts.node", "d.experts.in"))


def _in_stages(ar: Arithmetic, plan: Dispatch, parts: Array, sites: tuple[str, str, str]) -> Array:
    """parts (T, K, D)  ->  (T, D), over the ranks of a token, then over its nodes."""
    where = plan.placement
    ranks, nodes = where.ranks, where.nodes
    owners = (np.arange(len(parts))[:, None] * ranks + plan.target).reshape(-1)  # (T K,)  token R + rank
    kept, ids = np.unique(owners, return_inverse=True)
    per_rank = ar.at(sites[0], ar.segment_sum(parts.reshape(-1, parts.shape[-1]), ids, len(kept)))
    owners = kept // ranks * nodes + where.node_of(kept % ranks)
    kept, ids = np.unique(owners, return_inverse=True)
    per_node = ar.at(sites[1], ar.segment_sum(per_rank, ids, len(kept)))
    return ar.at(sites[2], ar.segment_sum(per_node, kept // nodes, len(parts)))


BY_SLOTS = Combine(_weighted, _summed)
IN_STAGES = Combine(_weighted_in_stages, _summed_in_stages)
