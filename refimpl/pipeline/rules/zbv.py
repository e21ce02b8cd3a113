"""ZB-V: two chunks per rank in the shape of a V, no bubble if F = I = W.  SPEC PIPE-8.

Rank r holds stage r (chunk 0, going down the V) and stage 2P-1-r (chunk 1, coming back), so the loss is on
the rank that has the embedding.  With F0, I0, W0 for actions of chunk 0, F1, I1, W1 for those of chunk 1, and
N = max(M, 2P - 1):

    warm-up    1.  2 (P - r) - 1 times  F0
               2.  r times              F1 F0
               3.  P - r times          F1 I1 W1
    stable     4.  N - P times          F0 (while there is one left) I0 W0 F1 I1 W1
    cool-down  5.  r times              I0 I1
               6.  P - r times          I0 W0
               7.  r times              W1
               8.  r times              W0

Zero Bubble Pipeline Parallelism (arXiv 2401.10241), section 6: worker i, from 1, warms up with 2p - i
forwards of the first chunk and i - 1 of the second, which are steps 1 and 2; PyTorch's ScheduleZBVZeroBubble.
(The zero-bubble repository searches greedily instead, and places W otherwise.)

The pipeline is full from 2P - 1 microbatches on.  With fewer the order is that of 2P - 1 without the actions
of the microbatches that are not there, as PyTorch has it.
"""

from __future__ import annotations

from refimpl.pipeline.rules.streams import Stream, weights
from refimpl.pipeline.schedule import Action, Entry, Schedule, bounded, in_a_v, numbered


def schedule(ranks: int, microbatches: int) -> Schedule:
    """Two stages per rank; any number of ranks and microbatches.

    Raises:
        Invalid: too large with 2 P - 1 microbatches, even if there are fewer.
    """
    full = max(microbatches, 2 * ranks - 1)
    bounded(ranks, full, 2)
    orders = [order(ranks, full, r) for r in range(ranks)]
    kept: list[list[Entry]] = [[a for a in own if a.microbatch < microbatches] for own in orders]
    return Schedule("zbv", microbatches, 2 * ranks, in_a_v(ranks), numbered(kept))


def order(ranks: int, microbatches: int, r: int) -> list[Action]:
    """Rank r's actions with at least 2 P - 1 microbatches."""
    down, back = Stream(r), Stream(2 * ranks - 1 - r)
    deferred: dict[Stream, list[Action]] = {down: [], back: []}

    def whole(stream: Stream) -> list[Action]:
        """I with its W right behind it."""
        action = stream.I()
        return [action, weights(action)]

    def late(stream: Stream) -> Action:
        """I whose W comes later, in step 6, 7 or 8."""
        action = stream.I()
        deferred[stream].append(weights(action))
        return action

    entries = [down.F() for _ in range(2 * (ranks - r) - 1)]  # 1
    for _ in range(r):  # 2
        entries += [back.F(), down.F()]
    for _ in range(ranks - r):  # 3
        entries += [back.F(), *whole(back)]
    left = microbatches - (2 * ranks - r - 1)  # forwards of chunk 0, of which steps 1 and 2 did the others
    for n in range(microbatches - ranks):  # 4
        if n < left:
            entries.append(down.F())
        entries += [*whole(down), back.F(), *whole(back)]
    for _ in range(r):  # 5
        entries += [late(down), late(back)]
    for _ in range(ranks - r):  # 6
        entries += [late(down), deferred[down].pop(0)]
    return entries + deferred[back] + deferred[down]  # 7, 8
