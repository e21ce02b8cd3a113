"""DualPipeV: DualPipe folded in the middle, so that no stage is there twice.  SPEC PIPE-11.

Rank r of P holds stage r and stage 2P-1-r, as in ZB-V.  The way down the V is direction 0 and the way back is
direction 1, for the same M microbatches; otherwise the eight steps are DualPipe's with H = P, h = r, m = M:

    1.  2 (P-r-1) times     F0
    2.  r+1 times           F0 F1
    3.  P-r-1 times         I1 W F1
    4.  M-2P+r+1 times      F0&B1 F1&B0         the last rank does the first F0, B1 one after the other
    5.  P-r-1 times         B1 F1&B0
    6.  r+1 times           B1 B0               from the middle of the step on I1 I0
    7.  P-r-1 times         W I0
    8.  r+1 times           W

`DualPipeV.step` of deepseek-ai/DualPipe, after Sea AI Lab's "cut in half"; PyTorch's ScheduleDualPipeV is the
same order.  M >= 2P, and M need not be even.  The warm-up is steps 1 and 2: 2P-r-1 forwards of direction 0
and r+1 of direction 1.  At most 2P+1 pairs of stage and microbatch are alive on a rank.
"""

from __future__ import annotations

from refimpl.errors import Invalid
from refimpl.pipeline.rules.dualpipe import eight_steps
from refimpl.pipeline.rules.streams import Stream
from refimpl.pipeline.schedule import Entry, Schedule, in_a_v, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """Two stages per rank.

    Raises:
        Invalid: fewer than 2 P microbatches.
    """
    if microbatches < 2 * ranks:
        raise Invalid(
            f"dualpipev needs at least 2 * ranks = {2 * ranks} microbatches, but has {microbatches}."
        )

    def order(r: int) -> list[Entry]:
        down, back = Stream(r), Stream(2 * ranks - 1 - r)
        return eight_steps(down, back, r, ranks, microbatches)

    orders = [order(r) for r in range(ranks)]
    return Schedule("dualpipev", microbatches, 2 * ranks, in_a_v(ranks), numbered(orders))
