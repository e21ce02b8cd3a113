"""What waits for what in a schedule, and ranks that wait for each other.  SPEC PIPE-13, PIPE-16 to PIPE-18.

An action needs, with S stages:

    F(s, m)           F(s-1, m)                             s > 0
    B(s, m), I(s, m)  F(s, m), and B or I (s+1, m)          s < S-1
    W(s, m)           I(s, m)

A rank does its entries in order and starts one when all that its actions need has been done; a pair needs
what both of its parts need, and hands over both results at its end.  What another rank has made comes as a
message, known by stage, microbatch and direction.

With unbounded sends a rank sends and forgets, and waits only for its inputs.  Under rendezvous a send waits
for its receive.  A rank posts receives ahead: for each of its stages, the first `ahead` activations at the
start, and another one whenever the entry that uses the oldest has ended; the same for gradients.  With
`ahead` = 0 it posts a receive when it comes to the entry that needs it.  Between two entries it commits in
one batch the sends of the one, the receives of the other and those that fall due, and it starts the other
when the sends of the one and the receives of the other have been met.  DeepSeek's code commits such batches,
and its schedules run with `ahead` = 1.  So

    entry i of rank r waits for   each entry of another rank that makes an input of it,
                                  and the entry of the receiver after which the receive of a message of
                                  entry i-1 is posted, for each such message
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from refimpl.pipeline.schedule import Action, Schedule

Place = tuple[int, int]  # rank, position


class Wait(NamedTuple):
    """Rank `rank` does not start its entry at `position` before rank `other` has ended the one at `until`."""

    rank: int
    position: int
    action: Action  # of the entry that waits; or, under rendezvous, the one before it, that sends
    other: int
    until: int
    needed: Action  # the action at `until`; or the one that the message is for
    message: bool = False  # whether it is a send that waits for its receive

    def __str__(self) -> str:
        if self.message:
            return (
                f"rank {self.rank} at position {self.position} waits with its message of {said(self.action)} "
                f"for the receive of {said(self.needed)}, after position {self.until} of rank {self.other}"
            )
        return (
            f"rank {self.rank} at position {self.position} waits with {said(self.action)} "
            f"for {said(self.needed)}, position {self.until} of rank {self.other}"
        )


def said(action: Action) -> str:
    return f"{action.kind} of stage {action.stage}, microbatch {action.microbatch}"


def needs(action: Action, where: Mapping[Action, Place]) -> list[Action]:
    """What has to be done before, as far as the schedule has it: what it lacks is another finding."""
    kind, stage, microbatch = action
    if kind == "F":
        wanted = [Action("F", stage - 1, microbatch)]
    elif kind == "W":
        wanted = [Action("I", stage, microbatch)]
    else:
        wanted = [Action(k, s, microbatch) for k, s in (("F", stage), ("B", stage + 1), ("I", stage + 1))]
    return [one for one in wanted if one in where]


def inputs(schedule: Schedule, where: Mapping[Action, Place]) -> list[Wait]:
    """The waits for inputs from other ranks, rank by rank in the order of its entries."""
    waits = []
    for rank, position, action in schedule.actions():
        if where.get(action) != (rank, position):
            continue  # no action of this schedule, or a repetition: neither makes others wait
        for needed in needs(action, where):
            other, until = where[needed]
            if other != rank:
                waits.append(Wait(rank, position, action, other, until, needed))
    return waits


def landings(schedule: Schedule, received: Iterable[Wait], ahead: int) -> list[Wait]:
    """The waits of sends for their receives, with `ahead` of them posted per stage and direction."""
    waits = []
    used: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for rank, position, action, sender, sent, made, _ in received:
        before = used[rank, action.stage, action.kind == "F"]
        posted = position  # the entry before which the receive is posted
        if ahead > 0:
            posted = before[-ahead] + 1 if len(before) >= ahead else 0
        before.append(position)
        if posted > 0 and sent + 1 < len(schedule.ranks[sender]):
            waits.append(Wait(sender, sent + 1, made, rank, posted - 1, action, message=True))
    return waits


def cycles(schedule: Schedule, waits: Iterable[Wait]) -> list[tuple[Wait, ...]]:
    """The cycles in which the ranks get stuck; none if all of them come to their end."""
    of: list[dict[int, list[Wait]]] = [defaultdict(list) for _ in schedule.ranks]
    for wait in waits:
        of[wait.rank][wait.position].append(wait)
    held = _held([len(own) for own in schedule.ranks], of)
    found, seen = [], set[int]()
    for start in held:
        path: dict[int, Wait] = {}
        rank = start
        while rank not in seen:  # each held rank waits for another held one
            seen.add(rank)
            path[rank] = held[rank]
            rank = held[rank].other
        if rank in path:
            ring = list(path)
            found.append(tuple(path[r] for r in ring[ring.index(rank) :]))
    return found


def _held(lengths: Sequence[int], of: Sequence[Mapping[int, Sequence[Wait]]]) -> dict[int, Wait]:
    """Runs all ranks as far as they come: those that do not reach their end, and the wait that holds each."""
    done = [0] * len(lengths)
    held: dict[int, Wait] = {}
    sleepers: dict[Place, list[int]] = defaultdict(list)
    ready = deque(range(len(lengths)))
    while ready:
        rank = ready.popleft()
        held.pop(rank, None)
        while done[rank] < lengths[rank]:
            position = done[rank]
            wait = next((w for w in of[rank].get(position, ()) if done[w.other] <= w.until), None)
            if wait is not None:
                held[rank] = wait
                sleepers[wait.other, wait.until].append(rank)
                break
            ready.extend(sleepers.pop((rank, position), ()))
            done[rank] += 1
    return held


def receives_ahead(schedule: Schedule) -> int | None:
    """The smallest `ahead` with which a legal schedule is free of deadlock under rendezvous.

    Every schedule that is free of deadlock with unbounded sends has one, at most M: then every receive is
    posted at the start.  None if there is a deadlock even so.
    """
    where = places(schedule)
    received = inputs(schedule, where)

    def runs(ahead: int) -> bool:
        return not cycles(schedule, [*received, *landings(schedule, received, ahead)])

    if cycles(schedule, received):
        return None
    least, most = -1, 0  # the one does not run, the other may
    while not runs(most):
        least, most = most, max(2 * most, 1)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if runs(middle) else (middle, most)
    return most


def places(schedule: Schedule) -> dict[Action, Place]:
    """Where each action is done: the first time, or where the others of its stage and microbatch are."""
    where: dict[Action, Place] = {}
    again: list[tuple[Action, Place]] = []
    for rank, position, action in schedule.actions():
        if known(schedule, action) and where.setdefault(action, (rank, position)) != (rank, position):
            again.append((action, (rank, position)))
    for action, place in again:
        others = [action._replace(kind=kind) for kind in "FBIW" if kind != action.kind]
        homes = [where[other][0] for other in others if other in where]
        if homes.count(place[0]) > homes.count(where[action][0]):
            where[action] = place
    return where


def known(schedule: Schedule, action: Action) -> bool:
    """Whether it is an action on a stage and a microbatch that there are."""
    return (
        action.kind in ("F", "B", "I", "W")
        and 0 <= action.stage < schedule.stages
        and 0 <= action.microbatch < schedule.microbatches
    )
