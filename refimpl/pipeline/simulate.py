"""When everything happens, in whole units of time.  SPEC PIPE-20 to PIPE-25.

    start = max(the rank is free, everything needed is there)      end = start + duration

A rank does its entries in their order.  What another rank made is there `latency` after it ended, what the
own rank made at once; a send holds up nobody.  A pair needs what both of its halves need and hands over both
results when it ends.

Which entry can follow which does not depend on durations: `sequence` puts all of them into one order by a
list of ranks to look at again, in time linear in the number of actions, and `timed` walks through it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import NamedTuple

from refimpl.errors import Invalid
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule
from refimpl.pipeline.waits import known


def whole(what: str, value: object) -> int:
    """A whole number >= 0.  Raises Invalid."""
    try:
        number = index(value)  # type: ignore[arg-type]  # whatever is no integer raises TypeError
    except TypeError:
        number = -1
    if number < 0 or isinstance(value, bool):
        raise Invalid(f"{what} is {value!r}, but has to be a whole number that is not negative.")
    return number


@dataclass(frozen=True, init=False)
class Durations:
    """How long an action takes on a stage of scale 1, in units of the caller's choice.

    B is a whole backward and FB a pair; left out they are I + W and F + B.  scale[s] multiplies what stage s
    does; without any all stages are alike.  Raises Invalid unless all are whole numbers and none is negative.
    """

    F: int
    I: int  # noqa: E741  # the published name
    W: int
    B: int
    FB: int
    latency: int
    scale: tuple[int, ...]

    def __init__(
        self,
        F: int,  # noqa: N803  # the published names
        I: int,  # noqa: E741, N803
        W: int,  # noqa: N803
        B: int | None = None,  # noqa: N803
        FB: int | None = None,  # noqa: N803
        latency: int = 0,
        scale: Sequence[int] = (),
    ) -> None:
        def set_(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        set_("F", whole("the duration of F", F))
        set_("I", whole("the duration of I", I))
        set_("W", whole("the duration of W", W))
        set_("B", self.I + self.W if B is None else whole("the duration of B", B))
        set_("FB", self.F + self.B if FB is None else whole("the duration of FB", FB))
        set_("latency", whole("the latency", latency))
        set_("scale", tuple(whole(f"the scale of stage {s}", value) for s, value in enumerate(scale)))

    def of(self, entry: Entry) -> int:
        """What an entry takes.  Halves of a pair that are scaled differently do not overlap."""
        if isinstance(entry, Pair):
            forward, backward = self._scale(entry.forward.stage), self._scale(entry.backward.stage)
            return self.FB * forward if forward == backward else self.F * forward + self.B * backward
        alone: int = getattr(self, entry.kind)
        return alone * self._scale(entry.stage)

    def _scale(self, stage: int) -> int:
        return self.scale[stage] if self.scale else 1


class Step(NamedTuple):
    """An entry and the places in the sequence of those that it needs."""

    rank: int
    entry: Entry
    needs: tuple[int, ...]


class Results:
    """What actions make, as numbers: F an output, I an input gradient, W weight gradients; B makes two."""

    def __init__(self, schedule: Schedule) -> None:
        self.stages, self.microbatches = schedule.stages, schedule.microbatches

    def number(self, kind: str, stage: int, microbatch: int) -> int:
        return 3 * (stage * self.microbatches + microbatch) + "FIW".index(kind)

    def said(self, number: int) -> str:
        (stage, microbatch), kind = divmod(number // 3, self.microbatches), "FIW"[number % 3]
        return said(Action(kind, stage, microbatch))

    def made(self, entry: Entry) -> list[int]:
        """The results of an entry."""
        results = []
        for kind, stage, microbatch in entry.parts:
            results += [self.number(made, stage, microbatch) for made in ("IW" if kind == "B" else kind)]
        return results

    def needed(self, entry: Entry) -> list[int]:
        """The results that must be there before an entry starts."""
        results = []
        for kind, stage, microbatch in entry.parts:
            if kind == "W":
                results.append(self.number("I", stage, microbatch))
            elif kind == "F":
                if stage > 0:
                    results.append(self.number("F", stage - 1, microbatch))
            else:
                results.append(self.number("F", stage, microbatch))
                if stage < self.stages - 1:
                    results.append(self.number("I", stage + 1, microbatch))
        return results


def sequence(schedule: Schedule) -> tuple[Step, ...]:
    """All entries in an order in which each finds what it needs.  Raises Invalid if some never do."""
    _well_formed(schedule)
    results = Results(schedule)
    steps: list[Step] = []
    there: dict[int, int] = {}  # a result -> the place of the step that makes it
    waits: dict[int, list[int]] = {}  # a result -> the ranks that cannot go on without it
    position = [0] * schedule.size
    looked_at = list(reversed(range(schedule.size)))
    while looked_at:
        rank = looked_at.pop()
        own = schedule.ranks[rank]
        while position[rank] < len(own):
            entry = own[position[rank]]
            needed = results.needed(entry)
            missing = next((result for result in needed if result not in there), None)
            if missing is not None:
                waits.setdefault(missing, []).append(rank)
                break
            for result in results.made(entry):
                there[result] = len(steps)
                looked_at += waits.pop(result, ())
            steps.append(Step(rank, entry, tuple(there[result] for result in needed)))
            position[rank] += 1
    if waits:
        missing_of = {rank: result for result, ranks in waits.items() for rank in ranks}
        raise Invalid(_deadlock(schedule, position, missing_of))
    return tuple(steps)


def timed(schedule: Schedule, steps: Sequence[Step], durations: Durations) -> Timeline:
    """The times of a schedule whose `sequence` is there.  Raises Invalid for scales that do not fit it."""
    if not isinstance(durations, Durations):
        raise Invalid(f"the durations are a {type(durations).__name__}, but they have to be Durations.")
    scales, stages = len(durations.scale), schedule.stages
    if scales not in (0, stages):
        raise Invalid(
            f"there are {scales} scales, but {schedule.name} has {stages} stages and needs one for each."
        )
    start: list[list[int]] = [[] for _ in range(schedule.size)]
    end: list[list[int]] = [[] for _ in range(schedule.size)]
    free = [0] * schedule.size
    ends: list[int] = []
    for rank, entry, needs in steps:
        begin = free[rank]
        for place in needs:
            begin = max(begin, ends[place] + (durations.latency if steps[place].rank != rank else 0))
        free[rank] = begin + durations.of(entry)
        ends.append(free[rank])
        start[rank].append(begin)
        end[rank].append(free[rank])
    return Timeline(schedule, durations, tuple(map(tuple, start)), tuple(map(tuple, end)))


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """When every entry starts and ends.

    Raises Invalid if the scales do not fit the stages, or the schedule does something twice or waits forever.
    """
    return timed(schedule, sequence(schedule), durations)


@dataclass(frozen=True)
class Timeline:
    """A schedule with its times: start[rank][position] and end[rank][position]; everything starts at 0."""

    schedule: Schedule
    durations: Durations
    start: tuple[tuple[int, ...], ...]
    end: tuple[tuple[int, ...], ...]

    @cached_property
    def makespan(self) -> int:
        """Until the last rank is done."""
        return max(self.last, default=0)

    @cached_property
    def busy(self) -> tuple[int, ...]:
        """Of each rank the time in which it does something."""
        return tuple(sum(end) - sum(start) for start, end in zip(self.start, self.end, strict=True))

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Of each rank when its first entry starts; 0 if it has none."""
        return tuple(own[0] if own else 0 for own in self.start)

    @cached_property
    def last(self) -> tuple[int, ...]:
        """Of each rank when its last entry ends; 0 if it has none."""
        return tuple(own[-1] if own else 0 for own in self.end)

    @cached_property
    def idle(self) -> tuple[int, ...]:
        """makespan - busy: what the DeepSeek-V3 report calls the bubble."""
        return tuple(self.makespan - busy for busy in self.busy)

    @cached_property
    def idle_within_span(self) -> tuple[int, ...]:
        """Idle between a rank's own first and last entry: what the zero-bubble papers call the bubble."""
        return tuple(
            last - first - busy for first, last, busy in zip(self.first, self.last, self.busy, strict=True)
        )


def said(action: Action) -> str:
    """An action in words."""
    return f"{action.kind} of stage {action.stage} on microbatch {action.microbatch}"


def _well_formed(schedule: Schedule) -> None:
    """Known kinds, stages and microbatches, and nothing done twice."""
    results, seen = Results(schedule), set[int]()
    for rank, position, action in schedule.actions():
        if not known(schedule, action):
            raise Invalid(
                f"rank {rank} has at position {position} the {said(action)}, but there are the kinds F, B, I "
                f"and W, {schedule.stages} stages and {schedule.microbatches} microbatches, counted from 0."
            )
        for result in results.made(action):
            if result in seen:
                raise Invalid(
                    f"rank {rank} makes at position {position} the {results.said(result)} again, "
                    f"but each is made once."
                )
            seen.add(result)


def _deadlock(schedule: Schedule, position: Sequence[int], missing: dict[int, int]) -> str:
    """The sentence that names what waits for what, until nobody makes it or the waits close a circle."""
    results = Results(schedule)
    makers = {
        result: rank
        for rank, own in enumerate(schedule.ranks)
        for entry in own
        for result in results.made(entry)
    }
    rank, links, passed = min(missing), [], set()
    while rank not in passed:
        passed.add(rank)
        result = missing[rank]
        links.append(f"rank {rank} waits at position {position[rank]} for the {results.said(result)}")
        if result not in makers:
            return f"the schedule cannot go on: {', '.join(links)}, which no rank makes."
        rank = makers[result]
    return f"the schedule cannot go on: {', '.join(links)}, which rank {rank} would make later."
