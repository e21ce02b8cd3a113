"""Schedules with one thing wrong, and schedules that are odd and right: (id, title, schedule).

SPEC CASE-19.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule, numbered

Row = tuple[str, str, Schedule]


def F(stage: int, microbatch: int) -> Action:  # noqa: N802  # the published names
    return Action("F", stage, microbatch)


def B(stage: int, microbatch: int) -> Action:  # noqa: N802
    return Action("B", stage, microbatch)


def I(stage: int, microbatch: int) -> Action:  # noqa: E743, N802
    return Action("I", stage, microbatch)


def W(stage: int, microbatch: int) -> Action:  # noqa: N802
    return Action("W", stage, microbatch)


def on(schedule: Schedule, rank: int, entries: Iterable[Entry]) -> Schedule:
    """With other entries on one rank."""
    ranks = [tuple(entries) if r == rank else own for r, own in enumerate(schedule.ranks)]
    return replace(schedule, ranks=numbered(ranks))


def without(schedule: Schedule, rank: int, *gone: Entry) -> Schedule:
    assert set(gone) <= set(schedule.ranks[rank])
    return on(schedule, rank, [entry for entry in schedule.ranks[rank] if entry not in gone])


def exchanged(schedule: Schedule, rank: int, one: Entry, other: Entry) -> Schedule:
    """Two entries of a rank in each other's place."""
    places = {one: other, other: one}
    return on(schedule, rank, [places.get(entry, entry) for entry in schedule.ranks[rank]])


def turned(schedule: Schedule, rank: int) -> Schedule:
    return on(schedule, rank, reversed(schedule.ranks[rank]))


def each(schedule: Schedule, change: Callable[[Entry], Iterable[Entry]]) -> Schedule:
    """Every entry replaced by some."""
    ranks = [[made for entry in own for made in change(entry)] for own in schedule.ranks]
    return replace(schedule, ranks=numbered(ranks))


def _late_weights(schedule: Schedule) -> Schedule:
    ranks = [sorted(own, key=lambda entry: entry.kind == "W") for own in schedule.ranks]
    return replace(schedule, ranks=numbered(ranks))


def _renamed(schedule: Schedule) -> Schedule:
    """Microbatch m as M - 1 - m everywhere."""
    last = schedule.microbatches - 1
    return each(schedule, lambda e: [a._replace(microbatch=last - a.microbatch) for a in e.parts])


def _split(entry: Entry) -> list[Entry]:
    kind, *of = entry
    return [Action("I", *of), Action("W", *of)] if kind == "B" else [entry]


def _torch_ir(schedule: Schedule) -> Schedule:
    """The forwards of the last rank as `_get_pipeline_order` of PyTorch numbers them."""
    rank = schedule.size - 1
    own = [a._replace(microbatch=a.microbatch + 1) if a.kind == "F" else a for a in _actions(schedule, rank)]
    return on(schedule, rank, own)


def _actions(schedule: Schedule, rank: int) -> list[Action]:
    return [action for entry in schedule.ranks[rank] for action in entry.parts]


_1F1B: Final = plan("1f1b", 3, 4)
_ZB1P: Final = plan("zb1p", 3, 4)
_ZBV: Final = plan("zbv", 2, 4)
_INTERLEAVED: Final = plan("interleaved", 2, 4)
_DUALPIPE: Final = plan("dualpipe", 4, 8)

ILLEGAL: Final[tuple[Row, ...]] = (
    ("dropped-1f1b", "1F1B without a backward", without(_1F1B, 1, B(1, 2))),
    ("dropped-f-1f1b", "1F1B without a forward that the next rank waits for", without(_1F1B, 0, F(0, 3))),
    ("dropped-w-zb1p", "ZB1P without one of the deferred W", without(_ZB1P, 2, W(2, 2))),
    ("dropped-w-dualpipe", "DualPipe without its last W", without(_DUALPIPE, 0, W(0, 3))),
    ("doubled-1f1b", "1F1B with a forward done twice", on(_1F1B, 1, (*_1F1B.ranks[1], F(1, 0)))),
    (
        "doubled-b-and-w",
        "ZB1P with the W of a whole backward on top",
        on(_ZB1P, 0, [B(0, 1) if entry == I(0, 1) else entry for entry in _ZB1P.ranks[0]]),
    ),
    ("w-before-i-zb1p", "ZB1P with a W before its I", exchanged(_ZB1P, 1, I(1, 2), W(1, 2))),
    ("w-before-i-zbv", "ZB-V with a W before its I", exchanged(_ZBV, 0, I(3, 0), W(3, 0))),
    ("reversed-1f1b", "1F1B with the first rank's order reversed", turned(_1F1B, 0)),
    ("reversed-dualpipe", "DualPipe with the last rank's order reversed", turned(_DUALPIPE, 3)),
    (
        "deadlock-1f1b",
        "1F1B whose first rank has the warm-up of the last: complete, but ranks wait for each other",
        on(_1F1B, 0, [entry for m in range(4) for entry in (F(0, m), B(0, m))]),
    ),
    (
        "deadlock-interleaved",
        "Interleaved 1F1B whose last rank takes its chunks in the wrong order",
        exchanged(_INTERLEAVED, 1, F(1, 0), F(3, 0)),
    ),
    (
        "deadlock-dualpipe",
        "DualPipe whose first rank wants a microbatch of the other direction at once",
        on(
            _DUALPIPE,
            0,
            (F(3, 4), *(entry for entry in _DUALPIPE.ranks[0] if entry != F(3, 4))),
        ),
    ),
    (
        "wrong-rank-1f1b",
        "1F1B with a stage's microbatch on a rank that does not hold the stage",
        on(without(_1F1B, 1, F(1, 1), B(1, 1)), 2, (F(1, 1), *_1F1B.ranks[2], B(1, 1))),
    ),
    (
        "wrong-rank-dualpipe",
        "DualPipe with a backward on the other rank that holds the stage",
        on(without(_DUALPIPE, 0, W(0, 3)), 3, (*_DUALPIPE.ranks[3], W(0, 3))),
    ),
    (
        "pair-of-itself",
        "A forward and its own backward as a pair",
        on(_1F1B, 2, [Pair(F(2, m), B(2, m)) for m in range(4)]),
    ),
    ("unknown-1f1b", "1F1B whose last rank counts forwards from 1", _torch_ir(_1F1B)),
)
LEGAL: Final[tuple[Row, ...]] = (
    ("1f1b", "1F1B", _1F1B),
    ("dualpipe", "DualPipe", _DUALPIPE),
    ("late-w", "ZB1P with every W at the end", _late_weights(_ZB1P)),
    ("split", "1F1B with I and W for every B", each(_1F1B, _split)),
    (
        "descending",
        "Interleaved 1F1B with the microbatches from the last to the first",
        _renamed(_INTERLEAVED),
    ),
    (
        "unpaired",
        "DualPipe with the two halves of a pair one after the other",
        each(_DUALPIPE, lambda entry: entry.parts),
    ),
    (
        "longer-warm-up",
        "1F1B whose first rank does all forwards first",
        on(_1F1B, 0, sorted(_1F1B.ranks[0], key=lambda entry: entry.kind == "B")),
    ),
)
