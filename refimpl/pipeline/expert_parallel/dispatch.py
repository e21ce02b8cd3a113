"""Where the tokens of a batch go, and on which path.  SPEC XPAR-4, XPAR-5.

A token goes once to every node that has one of its experts, to the rank there with the same place in its node
as the token's own rank; from there it is forwarded to each rank of that node that has one of its experts
(report section 3.2.2; DeepEP's internode kernels).  On its own node that first rank is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.expert_parallel.placement import Placement, spread


@dataclass(frozen=True)
class Dispatch:
    """The experts idx (T, K) of each token, and the rank source (T,) that holds it."""

    placement: Placement
    source: Array  # (T,) int
    idx: Array  # (T, K) int

    @cached_property
    def target(self) -> Array:
        """(T, K) the rank of each slot."""
        return np.asarray(self.placement.rank[self.idx])

    @cached_property
    def in_rank(self) -> Array:
        """(T, R) bool: whether the token goes to the rank.  DeepEP: is_token_in_rank."""
        return _marked(self.target, self.placement.ranks)

    @cached_property
    def in_node(self) -> Array:
        """(T, nodes) bool: whether the token goes to the node."""
        return _marked(self.placement.node_of(self.target), self.placement.nodes)

    @property
    def nodes_per_token(self) -> Array:
        """(T,) how many nodes have the token's experts, its own included."""
        return _counted(self.in_node, 1)

    @cached_property
    def landing(self) -> Array:
        """(T, nodes) the rank of each node at which the token comes in."""
        first = np.arange(self.placement.nodes) * self.placement.ranks_per_node
        return np.asarray(first + (self.source % self.placement.ranks_per_node)[:, None])

    @cached_property
    def over_network(self) -> Array:
        """(T, nodes) bool: whether the token crosses the network to that node."""
        own = self.placement.node_of(self.source)[:, None]
        return np.asarray(self.in_node & (np.arange(self.placement.nodes) != own))

    @cached_property
    def forwarded(self) -> Array:
        """(T, R) bool: whether the token is sent to that rank from another rank of its node."""
        ranks = np.arange(self.placement.ranks)
        return np.asarray(self.in_rank & (self.landing[:, self.placement.node_of(ranks)] != ranks))

    # How many tokens of rank s (the first axis) go where; what a destination receives is the sum over s.

    @cached_property
    def to_rank(self) -> Array:
        """(R, R) tokens from rank to rank.  A row is DeepEP's num_tokens_per_rank."""
        return self._by_source(self.in_rank)

    @cached_property
    def to_node(self) -> Array:
        """(R, nodes) tokens from rank to node.  A row is DeepEP's num_tokens_per_rdma_rank."""
        return self._by_source(self.in_node)

    @cached_property
    def to_expert(self) -> Array:
        """(R, N) slots from rank to expert.  A row is DeepEP's num_tokens_per_expert."""
        size, experts = self.placement.ranks, self.placement.experts
        cell = self.source[:, None] * experts + self.idx  # (T, K)
        return np.bincount(cell.reshape(-1), minlength=size * experts).reshape(size, experts)

    @property
    def per_rank(self) -> Array:
        """(R,) the tokens that each rank receives, its own included."""
        return _counted(self.in_rank, 0)

    @property
    def per_node(self) -> Array:
        """(nodes,) the tokens that each node receives, its own included."""
        return _counted(self.in_node, 0)

    @property
    def per_expert(self) -> Array:
        """(N,) the tokens of each expert."""
        return np.bincount(self.idx.reshape(-1), minlength=self.placement.experts)

    def _by_source(self, marks: Array) -> Array:
        """marks (T, n) bool  ->  (R, n) int."""
        ranks = range(self.placement.ranks)
        return np.stack([_counted(marks[self.source == rank], 0) for rank in ranks])


def dispatch(idx: npt.ArrayLike, placement: Placement, source: npt.ArrayLike | None = None) -> Dispatch:
    """idx (T, K) int, source (T,) int  ->  Dispatch; without `source` the ranks hold runs of tokens.

    Raises: Invalid for an expert or a rank that there is not.
    """
    idx = np.asarray(idx)
    if idx.ndim != 2 or not np.issubdtype(idx.dtype, np.integer):
        raise Invalid(
            f"idx is {idx.dtype} of shape {idx.shape}, but integers (tokens, experts) are required."
        )
    where = spread(len(idx), placement.ranks) if source is None else np.asarray(source)
    if where.shape != idx.shape[:1] or not np.issubdtype(where.dtype, np.integer):
        raise Invalid(
            f"source is {where.dtype} of shape {where.shape}, but a rank for each of {len(idx)} tokens is "
            "required."
        )
    for name, found, count in (("expert", idx, placement.experts), ("rank", where, placement.ranks)):
        wrong = (found < 0) | (found >= count)
        if wrong.any():
            token = int(np.argwhere(wrong)[0][0])
            value = int(found[wrong][0])
            raise Invalid(f"token {token} has {name} {value}, but {name}s are 0 to {count - 1}.")
    return Dispatch(placement, where, idx)


def check_nodes(plan: Dispatch, most: int) -> None:
    """Raises Invalid where a token goes to more nodes than `most`, as `placement.most_nodes` gives it."""
    found = plan.nodes_per_token
    if (found > most).any():
        token = int(np.argmax(found > most))
        raise Invalid(f"token {token} goes to {found[token]} nodes, but at most {most} are allowed.")


def _marked(at: Array, count: int) -> Array:
    """at (T, K) int  ->  (T, count) bool: whether the number is among the token's K."""
    marks = np.zeros((len(at), count), bool)
    np.put_along_axis(marks, at, True, 1)
    return marks


def _counted(marks: Array, axis: int) -> Array:
    return np.asarray(np.count_nonzero(marks, axis))
