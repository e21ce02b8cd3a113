"""A pipeline schedule as data.  SPEC PIPE-1.

P ranks hold S stages, chunks of the network in their order; M microbatches go through all of them.  Of each
rank a schedule says which actions it does in which order:

    F    the forward of a stage on a microbatch
    B    its whole backward, I and W in one
    I    the gradient of its input alone
    W    the gradients of its weights alone, any time after I
    a Pair is a forward and a whole backward overlapped: it starts when both have their inputs and hands over
    both outputs when it ends

There are no durations here, no tensors and no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refimpl.errors import Invalid

MOST = 2**20  # forwards in a schedule, ranks * chunks * microbatches: some 300 MB of actions
RANKS = 2**12  # of a schedule, planned or read


class Action(NamedTuple):
    """One piece of work; kind is F, B, I or W."""

    kind: str
    stage: int
    microbatch: int

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self,)


class Pair(NamedTuple):
    """A forward and a whole backward done as one."""

    forward: Action
    backward: Action

    @property
    def kind(self) -> str:
        return "FB"

    @property
    def parts(self) -> tuple[Action, ...]:
        return self


Entry = Action | Pair


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in its order.

    placement[r]: the stages that rank r holds.  Where two ranks hold the same stage (DualPipe), each computes
    it for its own microbatches: a microbatch stays on the copies of its direction.
    """

    name: str
    microbatches: int
    stages: int
    placement: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Entry, ...], ...]

    @property
    def size(self) -> int:
        """How many ranks there are, P."""
        return len(self.ranks)

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(rank, position, action) for all of them; a pair gives two at its position."""
        for rank, entries in enumerate(self.ranks):
            for position, entry in enumerate(entries):
                for action in entry.parts:
                    yield rank, position, action


def in_loops(ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """Rank r holds the stages r, P + r, 2 P + r, ..."""
    return tuple(tuple(range(r, ranks * chunks, ranks)) for r in range(ranks))


def in_a_v(ranks: int) -> tuple[tuple[int, ...], ...]:
    """Rank r holds the stages r and 2 P - 1 - r."""
    return tuple((r, 2 * ranks - 1 - r) for r in range(ranks))


def mirrored(ranks: int) -> tuple[tuple[int, ...], ...]:
    """Rank r holds the stages r and P - 1 - r, so that each stage is there twice."""
    return tuple((r, ranks - 1 - r) for r in range(ranks))


def numbered(entries: Sequence[Sequence[Entry]]) -> tuple[tuple[Entry, ...], ...]:
    """Lists of entries as a schedule holds them."""
    return tuple(tuple(own) for own in entries)


def bounded(ranks: int, microbatches: int, chunks: int) -> None:
    """Refuse a schedule that is too large to be meant, before anything is made for it."""
    if ranks > RANKS:
        raise Invalid(f"a schedule for {ranks} ranks is asked for, but it may have at most {RANKS}.")
    if ranks * microbatches * chunks > MOST:
        raise Invalid(
            f"{ranks} ranks with {chunks} stage(s) each and {microbatches} microbatches make "
            f"{ranks * microbatches * chunks} forwards, but a schedule may have at most {MOST}."
        )
