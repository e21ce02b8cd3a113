"""Whether a schedule is legal, and what is wrong with it.  SPEC PIPE-12 to PIPE-19.

For any schedule, also a user's own: every stage and microbatch has one forward and one backward, whole or
in its two halves, all on one rank that holds the stage; a rank does nothing before what it needs; and no
ranks wait for each other.  The time is linear in the number of actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from refimpl.errors import Invalid
from refimpl.pipeline.schedule import MOST, Action, Pair, Schedule
from refimpl.pipeline.waits import Place, Wait, cycles, inputs, known, landings, needs, places, said

MOST_FINDINGS = 1000  # who has more has another problem than the last ones
SHOWN = 6  # waits of a cycle in its text


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where.

    rule: shape, unknown, stage, repeated, missing, rank, order, deadlock or rendezvous
    position: of the entry on the rank, from 0; None for what is nowhere
    cycle: the waits of a deadlock, each for the next one and the last for the first
    """

    rule: str
    rank: int | None
    position: int | None
    action: Action | None
    text: str
    cycle: tuple[Wait, ...] = ()

    @property
    def ranks(self) -> frozenset[int]:
        """Every rank that it is about."""
        own = () if self.rank is None else (self.rank,)
        return frozenset((*own, *(wait.rank for wait in self.cycle)))

    def __str__(self) -> str:
        return self.text


def check(schedule: Schedule, ahead: int | None = None) -> list[Finding]:
    """What is wrong with a schedule; nothing if it is legal.

    ahead: receives that a rank posts in advance for each stage and direction (waits.py).  With a number,
    ranks that wait for each other under rendezvous are a finding as well.  None: as many as it takes, which
    is enough whenever unbounded sends are; `waits.receives_ahead` gives the smallest number.

    Raises:
        Invalid: it claims to be larger than any schedule may be.
    """
    if ahead is not None and ahead < 0:
        raise Invalid(f"ahead is {ahead}, but has to be at least 0.")
    if schedule.stages * schedule.microbatches > MOST:
        raise Invalid(
            f"{schedule.stages} stages and {schedule.microbatches} microbatches make "
            f"{schedule.stages * schedule.microbatches} forwards, but a schedule may have at most {MOST}."
        )
    return list(islice(_findings(schedule, ahead), MOST_FINDINGS))


def _findings(schedule: Schedule, ahead: int | None) -> Iterator[Finding]:
    wrong = list(_shape(schedule))
    yield from wrong
    if wrong:
        return
    where = places(schedule)
    yield from _each(schedule, where)
    yield from _complete(schedule, where)
    yield from _order(schedule, where)
    received = inputs(schedule, where)
    rings = cycles(schedule, received)
    yield from (_deadlock("deadlock", ring) for ring in rings)
    if ahead is not None and not rings:
        rings = cycles(schedule, [*received, *landings(schedule, received, ahead)])
        yield from (_deadlock("rendezvous", ring) for ring in rings)


def _shape(schedule: Schedule) -> Iterator[Finding]:
    """There is something to do, and every stage is somewhere."""

    def finding(text: str, rank: int | None = None) -> Finding:
        return Finding("shape", rank, None, None, text)

    if schedule.stages < 1 or schedule.microbatches < 1 or not schedule.ranks:
        yield finding(
            f"a schedule has ranks, stages and microbatches, but this one has {schedule.size}, "
            f"{schedule.stages} and {schedule.microbatches}."
        )
    if len(schedule.placement) != schedule.size:
        yield finding(f"the placement is for {len(schedule.placement)} ranks, but there are {schedule.size}.")
        return
    held = set[int]()
    for rank, stages in enumerate(schedule.placement):
        held.update(stages)
        strange = [stage for stage in stages if not 0 <= stage < schedule.stages]
        if strange:
            yield finding(
                f"rank {rank} is to hold stage {strange[0]}, but there are {schedule.stages} stages.", rank
            )
    for stage in range(schedule.stages):
        if stage not in held:
            yield finding(f"no rank holds stage {stage}.")


def _each(schedule: Schedule, where: dict[Action, Place]) -> Iterator[Finding]:
    """What can be said of one entry: it is an action, for the first time, on a rank that holds the stage."""
    for rank, entries in enumerate(schedule.ranks):
        for position, entry in enumerate(entries):
            here = f"rank {rank}, position {position}"
            if isinstance(entry, Pair) and (entry.forward.kind, entry.backward.kind) != ("F", "B"):
                text = f"a pair is F and B, but this one is {entry.forward.kind} and {entry.backward.kind}"
                yield Finding("unknown", rank, position, entry.forward, f"{here}: {text}.")
            for action in entry.parts:
                text, rule = "", ""
                if not known(schedule, action):
                    rule = "unknown"
                    text = (
                        f"is no action of {schedule.stages} stages and {schedule.microbatches} microbatches; "
                        "kinds are F, B, I and W"
                    )
                elif where[action] != (rank, position) or entry.parts.count(action) > 1:
                    first = where[action]
                    rule = "repeated"
                    text = f"is done twice, also at position {first[1]} of rank {first[0]}"
                elif action.stage not in schedule.placement[rank]:
                    rule = "stage"
                    text = f"is on a rank that does not hold the stage; {_holders(schedule, action.stage)}"
                if text:
                    yield Finding(rule, rank, position, action, f"{here}: {said(action)} {text}.")


def _complete(schedule: Schedule, where: dict[Action, Place]) -> Iterator[Finding]:
    """One F, and either B or I and W, on one rank."""
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            all_four = [Action(kind, stage, microbatch) for kind in "FBIW"]
            done = [action for action in all_four if action in where]
            f, b, i, w = (action in where for action in all_four)
            if f and ((b and not i and not w) or (i and w and not b)):
                if len({where[action][0] for action in done}) > 1:
                    yield from _apart(schedule, where, done)
                continue
            if not f:
                yield _missing(schedule, where, all_four[0], done)
            if b and (i or w):
                extra = all_four[2] if i else all_four[3]
                rank, position = where[extra]
                text = f"{said(extra)} comes on top of its whole backward"
                first = where[all_four[1]]
                yield Finding(
                    "repeated",
                    rank,
                    position,
                    extra,
                    f"rank {rank}, position {position}: {text}, position {first[1]} of rank {first[0]}.",
                )
            elif not b and not i:
                yield _missing(schedule, where, all_four[2 if w else 1], done)
            elif i and not w:
                yield _missing(schedule, where, all_four[3], done)


def _missing(schedule: Schedule, where: dict[Action, Place], action: Action, done: list[Action]) -> Finding:
    """It is expected where the others of its stage and microbatch are."""
    kind, stage, microbatch = action
    if done:
        rank = Counter(where[other][0] for other in done).most_common(1)[0][0]
    else:
        rank = next(r for r, stages in enumerate(schedule.placement) if stage in stages)
    after = {"F": (("B", stage), ("I", stage), ("F", stage + 1))}.get(
        kind, (("W", stage), ("B", stage - 1), ("I", stage - 1))
    )
    waiting = [other for k, s in after if (other := Action(k, s, microbatch)) in where]
    text = f"rank {rank}: {said(action)} is missing"
    if kind == "B":
        text += ", and there are no I and W in its place"
    if waiting and kind != "W":
        place = where[waiting[0]]
        text += f", which {said(waiting[0])} needs, position {place[1]} of rank {place[0]}"
    return Finding("missing", rank, None, action, f"{text}.")


def _apart(schedule: Schedule, where: dict[Action, Place], done: list[Action]) -> Iterator[Finding]:
    """One stage and microbatch on several ranks: those that are not where most of them are."""
    count = Counter(where[action][0] for action in done).most_common(2)
    home = None if count[0][1] == count[1][1] else count[0][0]
    for action in done:
        rank, position = where[action]
        if rank == home or action.stage not in schedule.placement[rank]:
            continue  # the latter has been said
        other = next(one for one in done if where[one][0] != rank)
        yield Finding(
            "rank",
            rank,
            position,
            action,
            f"rank {rank}, position {position}: {said(action)} has to be on one rank with {other.kind} "
            f"of the same, which is on rank {where[other][0]} at position {where[other][1]}.",
        )


def _order(schedule: Schedule, where: dict[Action, Place]) -> Iterator[Finding]:
    """A rank does nothing before what it needs of its own."""
    for rank, position, action in schedule.actions():
        if where.get(action) != (rank, position):
            continue
        for needed in needs(action, where):
            other, done = where[needed]
            if other == rank and done >= position:
                relation = "comes before" if done > position else "is in one pair with"
                yield Finding(
                    "order",
                    rank,
                    position,
                    action,
                    f"rank {rank}, position {position}: {said(action)} {relation} {said(needed)}, "
                    f"position {done}, which it needs.",
                )


def _deadlock(rule: str, ring: tuple[Wait, ...]) -> Finding:
    """Ranks that wait for each other, with all of the waits."""
    shown = "; ".join(str(wait) for wait in ring[:SHOWN])
    more = f"; and {len(ring) - SHOWN} more" if len(ring) > SHOWN else ""
    ranks = ", ".join(str(rank) for rank in sorted(wait.rank for wait in ring))
    how = "under rendezvous " if rule == "rendezvous" else ""
    text = f"{how}the ranks {ranks} wait for each other: {shown}{more}."
    first = ring[0]
    return Finding(rule, first.rank, first.position, first.action, text, ring)


def _holders(schedule: Schedule, stage: int) -> str:
    ranks = [str(rank) for rank, stages in enumerate(schedule.placement) if stage in stages]
    return f"rank {' and '.join(ranks)} does" if len(ranks) == 1 else f"ranks {' and '.join(ranks)} do"
