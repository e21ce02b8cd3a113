"""What a rank holds: live activations and parameters.  SPEC PIPE-26, PIPE-27, PIPE-38.

One activation is what a stage saves of one microbatch: it lives from its F until its release.  How many live
at once depends on the order alone, not on durations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from refimpl.errors import Invalid
from refimpl.pipeline.schedule import Entry, Schedule

RELEASING = {"W": frozenset("BW"), "I": frozenset("BI")}


def held(entries: Sequence[Entry], release: str = "W", backward_first: bool = False) -> tuple[int, ...]:
    """The most activations alive during each entry of a rank; the arguments are those of `peak`."""
    if release not in RELEASING:
        raise Invalid(f"activations are released at {release!r}, but that has to be at 'W' or at 'I'.")
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


class Load(NamedTuple):
    """P ranks, M microbatches, V chunks of a rank in groups of G, and the rule of release."""

    P: int
    M: int
    V: int
    G: int
    release: str
    backward_first: bool


class Peak(NamedTuple):
    """A peak by formula: in words, and on rank r."""

    text: str
    on: Callable[[Load, int], int]


def expected(
    schedule: Schedule, release: str = "W", backward_first: bool = False, group: int | None = None
) -> tuple[str, tuple[int, ...]]:
    """What `peak` gives for a schedule of `rules`, in words and by rank; group is what it was made with."""
    P, M = schedule.size, schedule.microbatches  # noqa: N806  # the published names
    if schedule.name not in PEAKS:
        raise Invalid(f"there is no peak by formula for {schedule.name!r}, but for {', '.join(PEAKS)}.")
    load = Load(P, M, schedule.stages // P, group or M // max(1, M // P), release, backward_first)
    text, on = PEAKS[schedule.name]
    return text, tuple(on(load, rank) for rank in range(P))


def _dualpipe(p: Load, rank: int) -> int:
    return p.P + (not p.backward_first or rank in (p.P // 2 - 1, p.P // 2))


def _dualpipev(p: Load, rank: int) -> int:
    return 2 * p.P + (not p.backward_first or rank == p.P - 1)


PEAKS = {
    "gpipe": Peak("M", lambda p, r: p.M),
    "1f1b": Peak("min(P - r, M)", lambda p, r: min(p.P - r, p.M)),
    "interleaved": Peak(
        "min((V - 1)G + 2(P - 1 - r) + 1, VM)",
        lambda p, r: min((p.V - 1) * p.G + 2 * (p.P - 1 - r) + 1, p.V * p.M),
    ),
    "zb1p": Peak(
        "min(P, M) released at W, min(P - r, M) at I",
        lambda p, r: min(p.P if p.release == "W" else p.P - r, p.M),
    ),
    "zbv": Peak("min(2P, M + 1 + r, 2M)", lambda p, r: min(2 * p.P, p.M + 1 + r, 2 * p.M)),
    "dualpipe": Peak("P + 1; B freed before F in a pair: P but on the two middle ranks", _dualpipe),
    "dualpipev": Peak("2P + 1; B freed before F in a pair: 2P but on the last rank", _dualpipev),
}
