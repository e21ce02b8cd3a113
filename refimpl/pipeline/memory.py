"""What a rank holds: live activations and parameters.  SPEC PIPE-26, PIPE-27.

One activation is what a stage saves of one microbatch: it lives from its F until its release.  How many live
at once depends on the order alone, not on durations.
"""

from __future__ import annotations

from collections.abc import Sequence

from refimpl.errors import Invalid
from refimpl.pipeline.schedule import Entry, Schedule

RELEASING = {"W": frozenset("BW"), "I": frozenset("BI")}


def held(entries: Sequence[Entry], release: str = "W", backward_first: bool = False) -> tuple[int, ...]:
    """The most activations alive during each entry of a rank; the arguments are those of `peak`."""
    if release not in RELEASING:
        raise Invalid(f"activations are released at {release!r}, but that has to be at 'W' or at 'I'")
    counts, live = [], 0
    for entry in entries:
        kinds = [action.kind for action in entry.parts]
        if backward_first:
            kinds.reverse()
        most = live
        for kind in kinds:
            live += (kind == "F") - (kind in RELEASING[release])
            most = max(most, live)
        counts.append(most)
    return tuple(counts)


def peak(schedule: Schedule, release: str = "W", backward_first: bool = False) -> tuple[int, ...]:
    """The most activations that each rank holds at once, in stages of one microbatch.

    release: "W" keeps an activation until its weight gradients are made, "I" only until its input gradient
    is; a whole backward B releases it either way.  A pair holds the new activation and the old one together,
    unless `backward_first` frees the old one before.
    """
    return tuple(max(held(own, release, backward_first), default=0) for own in schedule.ranks)


def copies(schedule: Schedule) -> tuple[int, ...]:
    """Of each stage how many ranks hold its parameters: 2 for DualPipe, otherwise 1."""
    stages = [stage for own in schedule.placement for stage in own]
    return tuple(stages.count(stage) for stage in range(schedule.stages))


def parameters(schedule: Schedule) -> tuple[int, ...]:
    """Of each rank how many stages it holds the parameters of: the 1x and 2x of the report's table 2, where a
    stage is one of PP."""
    return tuple(len(own) for own in schedule.placement)
