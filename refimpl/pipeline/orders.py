"""Whether a schedule's order is that of a rule.  SPEC PIPE-28, PIPE-48.

A name says nothing: a file may call anything "dualpipe".  What counts is that `rules.plan`, for the same
numbers of ranks and microbatches, gives each rank the same entries.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import takewhile, zip_longest
from weakref import WeakKeyDictionary

from refimpl.errors import Invalid
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action, Entry, Schedule
from refimpl.pipeline.simulate import said

_known: WeakKeyDictionary[Schedule, bool] = WeakKeyDictionary()  # a schedule is asked for at every duration


def follows(schedule: Schedule) -> bool:
    """Whether it is what the rule of its own name gives, of interleaved for any chunks and groups."""
    if schedule not in _known:
        _known[schedule] = _follows(schedule)
    return _known[schedule]


def differences(
    schedule: Schedule, name: str, chunks: int | None = None, group: int | None = None
) -> list[str]:
    """Where the order of each rank first differs from the rule's, a sentence for each such rank.

    Raises:
        Invalid: the rule has no schedule for these ranks and microbatches.
    """
    right = plan(name, schedule.size, schedule.microbatches, chunks, group)
    found = []
    for rank, pairs in enumerate(zip(schedule.ranks, right.ranks, strict=True)):
        for position, (own, other) in enumerate(zip_longest(*pairs)):
            if own != other:
                here = f"rank {rank}, position {position}"
                found.append(f"{here}: {_words(own)}, but {name} has {_words(other)}.")
                break
    return found


def _follows(schedule: Schedule) -> bool:
    if schedule.name not in RULES or not schedule.ranks:
        return False
    size, microbatches = schedule.size, schedule.microbatches
    if schedule.name != "interleaved":
        with suppress(Invalid):
            return schedule.ranks == plan(schedule.name, size, microbatches).ranks
        return False
    chunks = len(schedule.placement[0])
    for group in (_group(schedule, chunks), None):
        with suppress(Invalid):  # below P microbatches there is no group size to be given
            return schedule.ranks == plan("interleaved", size, microbatches, chunks, group).ranks
    return False


def _group(schedule: Schedule, chunks: int) -> int:
    """G: rank 0 begins with a group in its first chunk; with one chunk all groups are alike."""
    if chunks == 1:
        return schedule.microbatches
    first = takewhile(lambda entry: isinstance(entry, Action) and entry[:2] == ("F", 0), schedule.ranks[0])
    return sum(1 for _ in first)


def _words(entry: Entry | None) -> str:
    return "nothing" if entry is None else " with ".join(map(said, entry.parts))
