"""What the rules are written with: the microbatches of a stage on a rank, in ascending order.

Every rule here gives a stage its microbatches in ascending order, forward and backward alike, and runs
deferred weight gradients in the order in which they were deferred.  So a rule only has to say which kind of
action comes next, for which of the rank's stages.
"""

from __future__ import annotations

from itertools import count

from refimpl.pipeline.schedule import Action, Pair


class Stream:
    """One stage on one rank: each call gives the action for the next microbatch.

    B and I share a count, since a microbatch has either the one or the other.
    """

    def __init__(self, stage: int, first: int = 0) -> None:
        self.stage = stage
        self._forward = count(first)
        self._backward = count(first)

    def F(self) -> Action:  # noqa: N802  the kinds of actions are capital letters everywhere
        return Action("F", self.stage, next(self._forward))

    def B(self) -> Action:  # noqa: N802
        return Action("B", self.stage, next(self._backward))

    def I(self) -> Action:  # noqa: E743, N802
        return Action("I", self.stage, next(self._backward))


def weights(deferred: Action) -> Action:
    """The W that an I has left behind."""
    return Action("W", deferred.stage, deferred.microbatch)


def overlapped(forward: Stream, backward: Stream) -> Pair:
    """The next forward of the one and the next whole backward of the other, as a pair."""
    return Pair(forward.F(), backward.B())
