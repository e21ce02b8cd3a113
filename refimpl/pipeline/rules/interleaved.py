"""Interleaved 1F1B: V chunks per rank, in turn for groups of microbatches.  SPEC PIPE-5, PIPE-6.

Rank r holds the stages r, P + r, 2P + r, ...: its chunks 0 .. V-1.  Microbatches are taken in groups of G; a
rank runs a group through chunk 0, then through chunk 1, and so on, before the next group.  The table of all
M V forwards is, for M = 5, G = 3, V = 2:

    microbatch  0 1 2  0 1 2  3 4  3 4          the last group may be shorter
    chunk       0 0 0  1 1 1  0 0  1 1

Backwards follow the same table with chunk V-1-c in place of c.  Over these two lists it is 1F1B:

    warm-up       w = min((V-1) G + 2 (P-1-r), M V) forwards on rank r
    steady state  [F, B], M V - w times
    cool-down     w backwards

Before its first backward a rank has to take a group through all chunks but the last, hence (V-1) G, and two
more forwards for each rank behind it, hence 2 (P-1-r).  Megatron-LM's paper (arXiv 2104.04473), figure 4,
below, with G = P; its code for other G: `get_pp_rank_microbatches` and `get_schedule_table`.

Which G: Megatron takes any of P <= G <= M that leaves no last group shorter than P, as that one would stall
in every chunk.  Without a group size it is as in PyTorch's ScheduleInterleaved1F1B: R = max(1, M // P) equal
rounds, G = M / R, for every M that R divides, also below P.  Where both apply they give the same order.
"""

from __future__ import annotations

from refimpl.errors import Invalid
from refimpl.pipeline.schedule import Action, Entry, Schedule, in_loops, numbered


def group_size(ranks: int, microbatches: int, group: int | None) -> int:
    """G, for the size that was asked for, or by PyTorch's rule."""
    if group is None:
        rounds = max(1, microbatches // ranks)
        if microbatches % rounds:
            raise Invalid(
                f"interleaved without a group size needs microbatches // ranks = {rounds} equal rounds, but "
                f"{microbatches} is not a multiple of {rounds}."
            )
        return microbatches // rounds
    if not ranks <= group <= microbatches:
        raise Invalid(
            f"interleaved needs a group size from the number of ranks, {ranks}, to that of microbatches, "
            f"{microbatches}, but it is {group}."
        )
    last = microbatches % group
    if 0 < last < ranks:
        raise Invalid(
            f"interleaved needs a last group of no fewer microbatches than there are ranks, {ranks}, but "
            f"groups of {group} leave {last} of {microbatches}."
        )
    return group


def schedule(ranks: int, microbatches: int, chunks: int = 2, group: int | None = None) -> Schedule:
    """V = chunks stages per rank.

    Raises:
        Invalid: the microbatches cannot be grouped like this.
    """
    size = group_size(ranks, microbatches, group)
    table = [
        (chunk, m)
        for first in range(0, microbatches, size)
        for chunk in range(chunks)
        for m in range(first, min(first + size, microbatches))
    ]

    def order(r: int) -> list[Entry]:
        forwards = [Action("F", chunk * ranks + r, m) for chunk, m in table]
        backwards = [Action("B", (chunks - 1 - chunk) * ranks + r, m) for chunk, m in table]
        warm_up = min((chunks - 1) * size + 2 * (ranks - 1 - r), len(table))
        steady = len(table) - warm_up
        entries: list[Entry] = [*forwards[:warm_up]]
        for forward, backward in zip(forwards[warm_up:], backwards[:steady], strict=True):
            entries += [forward, backward]
        return entries + [*backwards[steady:]]

    placement = in_loops(ranks, chunks)
    return Schedule(
        "interleaved", microbatches, ranks * chunks, placement, numbered([order(r) for r in range(ranks)])
    )
