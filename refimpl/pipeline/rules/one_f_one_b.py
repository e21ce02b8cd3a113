"""1F1B: a backward as soon as there can be one.  SPEC PIPE-4.

    warm-up       w = min(P - r, M) forwards on rank r
    steady state  [B, F], M - w times
    cool-down     w backwards

PipeDream-Flush (arXiv 2006.09503); Megatron-LM's paper (arXiv 2104.04473), figure 4, above; PyTorch's
Schedule1F1B as it is executed.  Megatron counts the last forward of the warm-up as the first of its [F, B]
pairs, so its warm-up is P - r - 1; the order is the same.  The last rank has w = 1 and alternates from the
start, and rank r never keeps more than P - r microbatches, however many there are.

PyTorch refuses M < P.  The rule needs no such condition, and Megatron and the zero-bubble repository run it:
here it is allowed.
"""

from __future__ import annotations

from refimpl.pipeline.rules.streams import Stream
from refimpl.pipeline.schedule import Entry, Schedule, in_loops, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; any number of ranks and microbatches."""

    def order(r: int) -> list[Entry]:
        stage = Stream(r)
        warm_up = min(ranks - r, microbatches)
        entries: list[Entry] = [stage.F() for _ in range(warm_up)]
        for _ in range(microbatches - warm_up):
            entries += [stage.B(), stage.F()]
        entries += [stage.B() for _ in range(warm_up)]
        return entries

    return Schedule(
        "1f1b", microbatches, ranks, in_loops(ranks, 1), numbered([order(r) for r in range(ranks)])
    )
