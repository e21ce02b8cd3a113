"""How good a diagnosis is: whether the planted mistake is named first, or the wrong stage of an unknown one.

An id counts as its entry in the catalogue, without the letter of a reading.  A class names a mistake when
one of its alternatives is that mistake alone.  A pair is named when the findings that are named first, each
by one of its alternatives, name both mistakes and no other.  The stage is the one that the report says first,
of the smallest component that fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from diagnosis_ports import KNOWN, PAIR, RIGHT, SUBJECTS, Subject

Named = tuple[tuple[tuple[str, ...], ...], ...]  # findings, each of alternatives, each of ids
FIRST, LATER, HALF, WRONG, NONE = "first", "later", "one of two", "wrong claim", "none named"
RIGHT_STAGE, OTHER_STAGE = "right stage", "other stage"
PASSES, FAILS, FALSE = "passes", "FAILS", "FALSE CLAIM"
UNCAUGHT, NOT_A_MISTAKE, CRASHED = "no case fails", "not a mistake", "crashes"
APART: Final = (UNCAUGHT, NOT_A_MISTAKE, CRASHED)  # nothing to diagnose
GOOD: Final = (FIRST, RIGHT_STAGE, PASSES)


@dataclass(frozen=True)
class Row:
    """What became of one planted change in one dtype."""

    name: str
    dtype: str
    cases: str  # which set of cases
    ran: int
    failed: tuple[str, ...] = ()  # cases that did not hold
    crashed: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()  # failed case, and the tensor that is off first
    named: Named = ()
    explained: int = 0  # failed cases
    unexplained: int = 0
    stages: tuple[tuple[str, str, str], ...] = ()  # unexplained case, stage that is wrong, its component
    seconds: float = 0.0  # of the processor


def entry(id: str) -> str:
    """R04b is a reading of R04."""
    return id[:3]


def score(row: Row) -> str:
    subject = SUBJECTS[row.name]
    classes = [[frozenset(entry(id) for id in one) for one in finding] for finding in row.named]
    if subject.kind == RIGHT:
        return FALSE if classes else FAILS if row.failed or row.crashed else PASSES
    if not row.failed:
        return CRASHED if row.crashed else UNCAUGHT if row.dtype in subject.dtypes else NOT_A_MISTAKE
    if subject.kind == PAIR:
        return _pair(subject, classes)
    if subject.kind == KNOWN:
        hits = [any({id} == one for id in subject.answers[0] for one in c) for c in classes]
        return NONE if not hits else FIRST if hits[0] else LATER if any(hits) else WRONG
    if classes:
        return WRONG
    stage = row.stages[0][1] if row.stages else ""
    return RIGHT_STAGE if any(fnmatchcase(stage, pattern) for pattern in subject.stage) else OTHER_STAGE


def _pair(subject: Subject, classes: list[list[frozenset[str]]]) -> str:
    both, met = [set(ids) for ids in subject.answers], [False, False]
    for i, alternatives in enumerate(classes):
        own = [one for one in alternatives if one <= both[0] | both[1]]
        if not own:
            return WRONG if i == 0 else HALF
        met = [seen or any(one & ids for one in own) for seen, ids in zip(met, both, strict=True)]
        if all(met):
            return FIRST
    return HALF if classes else NONE


def surplus(row: Row) -> bool:
    """A finding behind the first names something else that was not planted."""
    planted = {id for ids in SUBJECTS[row.name].answers for id in ids}
    return any(not any({entry(id) for id in one} <= planted for one in finding) for finding in row.named[1:])
