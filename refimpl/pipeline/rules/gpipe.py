"""GPipe: all forwards, then all backwards.  SPEC PIPE-3.

    F 0 .. M-1, B 0 .. M-1                      on every rank

GPipe (arXiv 1811.06965), figure 2c, draws the backwards in descending order; PyTorch's ScheduleGPipe, which
is followed here, runs them in ascending order.  There is no warm-up to count: all M forwards come first, so a
rank keeps the activations of all M microbatches.
"""

from __future__ import annotations

from refimpl.pipeline.schedule import Action, Entry, Schedule, in_loops, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; any number of ranks and microbatches."""

    def order(r: int) -> list[Entry]:
        return [Action(kind, r, m) for kind in "FB" for m in range(microbatches)]

    return Schedule(
        "gpipe", microbatches, ranks, in_loops(ranks, 1), numbered([order(r) for r in range(ranks)])
    )
