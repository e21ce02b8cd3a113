"""ZB1P, also called ZB-H1: 1F1B whose weight gradients fill the bubble.  SPEC PIPE-7.

    warm-up       w = min(P - 1 - r, M) forwards on rank r
    then, for n = 0 .. M-1:
        F         while there is one left
        I n       the gradient of the input, which the rank before waits for
        W n - r   from n = r on: rank r runs r weight gradients late
    at last       the W that are left, min(r, M) of them

The W that are late stand where 1F1B waits in its cool-down, and the rank before gets its I without waiting
for a W.  Zero Bubble Pipeline Parallelism (arXiv 2401.10241), figure 3, above (ZB-H1); PyTorch's
ScheduleInterleavedZeroBubble with one stage per rank.  The warm-up is counted as by Megatron: an F of the
loop follows it at once.  If it is W that releases a microbatch, min(P, M) are alive on every rank.

PyTorch refuses M that its rounds do not divide (PIPE-6).  With one chunk a round has no effect on the order:
here every M is allowed.
"""

from __future__ import annotations

from refimpl.pipeline.rules.streams import Stream, weights
from refimpl.pipeline.schedule import Action, Entry, Schedule, in_loops, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; any number of ranks and microbatches."""

    def order(r: int) -> list[Entry]:
        stage = Stream(r)
        warm_up = min(ranks - 1 - r, microbatches)
        entries: list[Entry] = [stage.F() for _ in range(warm_up)]
        deferred: list[Action] = []
        for n in range(microbatches):
            if warm_up + n < microbatches:
                entries.append(stage.F())
            deferred.append(stage.I())
            entries.append(deferred[n])
            if n >= r:
                entries.append(weights(deferred[n - r]))
        left = deferred[max(microbatches - r, 0) :]
        return entries + [weights(action) for action in left]

    return Schedule(
        "zb1p", microbatches, ranks, in_loops(ranks, 1), numbered([order(r) for r in range(ranks)])
    )
