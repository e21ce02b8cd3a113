"""DualPipe: microbatches enter at both ends.  SPEC PIPE-9, PIPE-10.

P ranks, an even number; rank r holds stage r and stage P-1-r, so each stage is there twice.  Microbatches
below M/2 go from rank 0 to rank P-1, the others from rank P-1 to rank 0.  A rank calls the direction that
enters at its nearer end 0 and the other one 1; h = min(r, P-1-r) is its distance from that end, H = P/2, and
m = M/2 the microbatches of a direction:

    1.  2 (H-h-1) times     F0
    2.  h+1 times           F0 F1
    3.  H-h-1 times         I1 W F1
    4.  m-2H+h+1 times      F0&B1 F1&B0         the two middle ranks do the first F0, B1 one after the other
    5.  H-h-1 times         B1 F1&B0
    6.  h+1 times           B1 B0               from the middle of the step on I1 I0
    7.  H-h-1 times         W I0
    8.  h+1 times           W

W is the oldest one that waits.  Step 6 turns from B to I in its iteration (h+1) // 2, counted from 0: before
the backward of direction 1 if h is odd, after it if h is even.

DeepSeek-V3's report (arXiv 2412.19437), section 3.2.1 and figure 5; the numbered steps of `DualPipe.step` in
deepseek-ai/DualPipe, which demands an even M of at least 2P.  The warm-up is steps 1 and 2: P-h-1 forwards of
direction 0 and h+1 of direction 1.  At most P+1 pairs of stage and microbatch are alive on a rank.
"""

from __future__ import annotations

from collections import deque

from refimpl.errors import Invalid
from refimpl.pipeline.rules.streams import Stream, overlapped, weights
from refimpl.pipeline.schedule import Action, Entry, Schedule, mirrored, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """Two stages per rank, each stage on two ranks.

    Raises:
        Invalid: odd ranks or microbatches, or fewer than 2 P microbatches.
    """
    if ranks % 2:
        raise Invalid(f"dualpipe needs an even number of ranks, each with its mirror image, but has {ranks}.")
    if microbatches % 2:
        raise Invalid(f"dualpipe needs as many microbatches in both directions, but {microbatches} is odd.")
    if microbatches < 2 * ranks:
        raise Invalid(
            f"dualpipe needs at least 2 * ranks = {2 * ranks} microbatches, but has {microbatches}."
        )
    each = microbatches // 2

    def order(r: int) -> list[Entry]:
        down, up = Stream(r), Stream(ranks - 1 - r, first=each)
        zero, one = (down, up) if r < ranks // 2 else (up, down)
        return eight_steps(zero, one, min(r, ranks - 1 - r), ranks // 2, each)

    orders = [order(r) for r in range(ranks)]
    return Schedule("dualpipe", microbatches, ranks, mirrored(ranks), numbered(orders))


def eight_steps(zero: Stream, one: Stream, h: int, half: int, each: int) -> list[Entry]:
    """The steps above for the streams of directions 0 and 1; half = H, each = m."""
    waiting: deque[Action] = deque()

    def late(stream: Stream) -> Action:
        """I, whose W waits."""
        action = stream.I()
        waiting.append(weights(action))
        return action

    entries: list[Entry] = [zero.F() for _ in range(2 * (half - h - 1))]  # 1
    for _ in range(h + 1):  # 2
        entries += [zero.F(), one.F()]
    for _ in range(half - h - 1):  # 3
        entries += [late(one), waiting.popleft(), one.F()]
    for n in range(each - 2 * half + h + 1):  # 4
        if n == 0 and h == half - 1:  # "we don't overlap these two chunks to further reduce bubble size"
            entries += [zero.F(), one.B()]
        else:
            entries.append(overlapped(zero, one))
        entries.append(overlapped(one, zero))
    for _ in range(half - h - 1):  # 5
        entries += [one.B(), overlapped(one, zero)]
    turn = (h + 1) // 2
    for n in range(h + 1):  # 6
        entries.append(late(one) if n > turn or (n == turn and h % 2 == 1) else one.B())
        entries.append(late(zero) if n >= turn else zero.B())
    for _ in range(half - h - 1):  # 7
        entries += [waiting.popleft(), late(zero)]
    assert len(waiting) == h + 1, "one W is left for each iteration of step 8"
    return entries + [*waiting]  # 8
