"""Where experts, ranks and tokens live.  SPEC XPAR-1 to XPAR-3.

N experts are on R ranks and these on nodes, R / nodes neighbouring ranks on each.  V3 trains with 256 experts
on 64 ranks of 8 nodes, and its 8 groups of experts are its 8 nodes (report sections 3.2 and 4.2).  An expert
is on one rank: redundant copies, as for serving, are not covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid, Unsupported
from refimpl.numerics.arithmetic import Array


@dataclass(frozen=True)
class Placement:
    """held[r]: the experts of rank r; an expert's local number is its position there.

    Raises: Invalid for a map in which an expert is missing, or ranks that nodes do not divide; Unsupported
    for an expert in two places.
    """

    held: tuple[tuple[int, ...], ...]
    nodes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", _lists(self.held))
        object.__setattr__(self, "nodes", _positive("nodes", self.nodes))
        if not self.held:
            raise Invalid("placement has 0 ranks, but at least 1 is required.")
        if len(self.held) % self.nodes:
            raise Invalid(
                f"{len(self.held)} ranks are no multiple of {self.nodes} nodes, but they have to be."
            )
        first: dict[int, int] = {}
        for rank, own in enumerate(self.held):
            for expert in own:
                if expert < 0:
                    raise Invalid(f"rank {rank} has expert {expert}, but experts count from 0.")
                if expert in first:
                    raise Unsupported(
                        f"expert {expert} is on rank {first[expert]} and on rank {rank}, but redundant "
                        "experts are not supported."
                    )
                first[expert] = rank
        for expert in range(len(first)):
            if expert not in first:
                raise Invalid(f"expert {expert} is on no rank, but experts 0 to {max(first)} each need one.")
        if not first:
            raise Invalid("placement has 0 experts, but at least 1 is required.")

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @cached_property
    def experts(self) -> int:
        return len(self.rank)

    @cached_property
    def rank(self) -> Array:
        """(N,) the rank of each expert."""
        return self._by_expert([rank for rank, own in enumerate(self.held) for _ in own])

    @cached_property
    def local(self) -> Array:
        """(N,) the number of each expert on its rank."""
        return self._by_expert([local for own in self.held for local in range(len(own))])

    @property
    def node(self) -> Array:
        """(N,) the node of each expert."""
        return self.node_of(self.rank)

    def node_of(self, rank: Array) -> Array:
        """The nodes of ranks."""
        return rank // self.ranks_per_node

    def _by_expert(self, values: list[int]) -> Array:
        found = np.zeros(len(values), np.int64)
        found[[expert for own in self.held for expert in own]] = values
        return found


def evenly(experts: int, ranks: int, nodes: int = 1) -> Placement:
    """Rank r holds the experts r N / R up to (r + 1) N / R.  Raises Invalid where R does not divide N."""
    experts, ranks = _positive("experts", experts), _positive("ranks", ranks)
    if experts % ranks:
        raise Invalid(f"{experts} experts are no multiple of {ranks} ranks, but they have to be.")
    each = experts // ranks
    return Placement(tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks)), nodes)


def by_rank(rank: Sequence[int] | Mapping[int, int], ranks: int, nodes: int = 1) -> Placement:
    """A user's own map from expert to rank; a rank's experts are numbered in ascending order."""
    pairs = rank.items() if isinstance(rank, Mapping) else enumerate(rank)
    held: list[list[int]] = [[] for _ in range(_positive("ranks", ranks))]
    for expert, own in sorted(pairs):
        if not _is_integer(own) or not 0 <= own < ranks:
            raise Invalid(f"expert {expert} is on rank {own!r}, but ranks are 0 to {ranks - 1}.")
        held[own].append(expert)
    return Placement(_lists(held), nodes)


def spread(tokens: int, ranks: int) -> Array:
    """(T,) the rank that holds each token: runs of neighbours, the first T mod R ranks with one more."""
    each, more = divmod(tokens, ranks)
    return np.repeat(np.arange(ranks), [each + (rank < more) for rank in range(ranks)])


def most_nodes(config: ModelConfig, placement: Placement) -> int:
    """How many nodes the gate can send a token to, at most: M of the report, where groups are nodes.

    The kept groups lie on no more nodes than the widest of them together, and K experts on no more than K.
    """
    check_experts(config, placement)
    groups = placement.node.reshape(config.groups, -1)
    spans = sorted((len(np.unique(nodes)) for nodes in groups), reverse=True)
    return min(sum(spans[: config.kept_groups]), config.num_experts_per_tok, placement.nodes)


def check_experts(config: ModelConfig, placement: Placement) -> None:
    """Raises Invalid where the placement is not one of this model's experts."""
    if placement.experts != config.n_routed_experts:
        raise Invalid(
            f"placement has {placement.experts} experts, but the model has {config.n_routed_experts} and "
            "each needs a rank."
        )


def _lists(held: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    for rank, own in enumerate(held):
        if isinstance(own, int | np.integer):
            raise Invalid(f"rank {rank} has {own}, but a list of experts is required.")
        for expert in own:
            if not _is_integer(expert):
                raise Invalid(f"rank {rank} has expert {expert!r}, but experts are integers.")
    return tuple(tuple(int(expert) for expert in own) for own in held)


def _positive(name: str, value: int) -> int:
    if not _is_integer(value) or value < 1:
        raise Invalid(f"{name} is {value!r}, but an integer of at least 1 is required.")
    return int(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
