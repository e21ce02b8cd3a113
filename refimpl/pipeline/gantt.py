"""What a Gantt chart of a schedule shows, before it has colours or sizes.  SPEC PIPE-44.

A cell for each action; a pair is two cells that share its time as their durations F and B do, in a frame.  A
cell's shade tells what one rank has several of: the direction of a microbatch where two ranks hold each stage
(DualPipe), otherwise the chunk of its rank that the stage is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refimpl.pipeline.rules import RULES
from refimpl.pipeline.schedule import Action, Entry, Schedule
from refimpl.pipeline.simulate import Durations, Timeline

KINDS = ("F", "B", "I", "W", "FB")


class Cell(NamedTuple):
    """One action in its row."""

    rank: int
    start: float
    end: float
    kind: str
    shade: int
    microbatch: int


class Frame(NamedTuple):
    """Around the two cells of a pair."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Chart:
    """A schedule's rows; shades counts the shades, and `meaning` says what they tell apart, if anything."""

    name: str
    title: str
    result: str
    meaning: str
    shades: int
    ranks: int
    makespan: int
    cells: tuple[Cell, ...]
    frames: tuple[Frame, ...]


def chart(timeline: Timeline) -> Chart:
    """The chart of a simulated schedule."""
    schedule = timeline.schedule
    shading = Shading.of(schedule)
    cells, frames = [], []
    for rank, own in enumerate(schedule.ranks):
        for entry, start, end in zip(own, timeline.start[rank], timeline.end[rank], strict=True):
            for action, begin, finish in _divided(entry, start, end, timeline.durations):
                shade = shading.shade(rank, action)
                cells.append(Cell(rank, begin, finish, action.kind, shade, action.microbatch))
            if len(entry.parts) == 2:
                frames.append(Frame(rank, start, end))
    return Chart(
        name(schedule),
        title(schedule),
        result(timeline),
        shading.meaning,
        shading.count,
        schedule.size,
        timeline.makespan,
        tuple(cells),
        tuple(frames),
    )


def name(schedule: Schedule) -> str:
    """As the papers write it, where it is one of theirs."""
    return RULES[schedule.name].title if schedule.name in RULES else schedule.name


def title(schedule: Schedule) -> str:
    """The schedule in words."""
    ranks, microbatches = _counted(schedule.size, "rank"), _counted(schedule.microbatches, "microbatch")
    stages = "" if schedule.stages == schedule.size else f", {_counted(schedule.stages, 'stage')}"
    return f"{name(schedule)}, {ranks}{stages}, {microbatches}"


def result(timeline: Timeline) -> str:
    """The durations of what occurs, makespan and idle time in words."""
    times, present = timeline.durations, {entry.kind for own in timeline.schedule.ranks for entry in own}
    kinds = [f"{kind.replace('FB', 'F&B')} {getattr(times, kind)}" for kind in KINDS if kind in present]
    if times.latency:
        kinds.append(f"latency {times.latency}")
    least, most = min(timeline.idle), max(timeline.idle)
    idle = f"{most}" if least == most else f"{least} to {most}"
    share = 100 * most / max(timeline.makespan, 1)
    return f"{', '.join(kinds)}: makespan {timeline.makespan}, idle {idle} ({share:.1f}%)"


@dataclass(frozen=True)
class Shading:
    """How many shades a schedule needs, what they mean, and who has which."""

    count: int
    meaning: str
    placement: Sequence[Sequence[int]]
    directions: dict[int, int]  # microbatch -> direction, where there are two

    @classmethod
    def of(cls, schedule: Schedule) -> Shading:
        """Directions are told by the rank on which a microbatch begins, in the order of the ranks."""
        placement = [sorted(own) for own in schedule.placement]
        holders = [rank for rank, own in enumerate(placement) if 0 in own]
        if len(holders) > 1:
            begins = {
                action.microbatch: holders.index(rank)
                for rank, _, action in schedule.actions()
                if action.kind == "F" and action.stage == 0 and rank in holders
            }
            first, last = holders[0], holders[-1]
            meaning = f"light: microbatches that begin on device {first}; dark: on device {last}"
            return cls(len(holders), meaning, placement, begins)
        count = max(1, *map(len, placement))
        meaning = {1: "", 2: "light: chunk 0 of a device; dark: chunk 1"}.get(
            count, f"light to dark: chunks 0 to {count - 1} of a device"
        )
        return cls(count, meaning, placement, {})

    def shade(self, rank: int, action: Action) -> int:
        if self.directions:
            return self.directions.get(action.microbatch, 0)
        return self.placement[rank].index(action.stage) if action.stage in self.placement[rank] else 0


def _divided(
    entry: Entry, start: int, end: int, durations: Durations
) -> Iterator[tuple[Action, float, float]]:
    weights = [durations.of(action) for action in entry.parts]
    if not any(weights):
        weights = [1] * len(weights)
    begin = float(start)
    for action, weight in zip(entry.parts, weights, strict=True):
        finish = begin + (end - start) * weight / sum(weights)
        yield action, begin, finish
        begin = finish


def _counted(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("ch") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"
