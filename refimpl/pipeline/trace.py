"""Simulated schedules as a Chrome trace, which Perfetto opens as well.  SPEC PIPE-43.

A process for each schedule, a thread for each rank, a slice for each entry; a unit of time is a microsecond.
Arrows go from what a rank sends to where another needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final

from refimpl.pipeline.gantt import name, title
from refimpl.pipeline.schedule import Action, Entry
from refimpl.pipeline.simulate import Timeline

# The colours that Chrome has names for; Perfetto takes its own, by the slice's name without numbers.
COLOURS: Final = {
    "F": "rail_idle",
    "B": "rail_load",
    "I": "rail_response",
    "W": "detailed_memory_dump",
    "FB": "olive",
}


def text(timelines: Sequence[Timeline]) -> str:
    """The file: an event to a line."""
    identities = count(1)
    events = [
        json.dumps(event, separators=(",", ":"))
        for process, timeline in enumerate(timelines)
        for event in _events(timeline, process, identities)
    ]
    return '{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(events) + "\n]}\n"


def _events(timeline: Timeline, process: int, identities: Iterator[int]) -> Iterator[dict[str, Any]]:
    schedule = timeline.schedule
    yield _named("process_name", process, 0, name=title(schedule))
    yield _named("process_sort_index", process, 0, sort_index=process)
    for rank in range(schedule.size):
        yield _named("thread_name", process, rank, name=f"Device {rank}")
        yield _named("thread_sort_index", process, rank, sort_index=rank)
    senders: dict[tuple[str, int, int], tuple[int, int, int]] = {}  # what is sent -> rank, start, end
    for rank, own in enumerate(schedule.ranks):
        for entry, start, end in zip(own, timeline.start[rank], timeline.end[rank], strict=True):
            senders |= {_sent(action): (rank, start, end) for action in entry.parts if action.kind != "W"}
            yield {
                "name": " & ".join(f"{action.kind} {action.microbatch}" for action in entry.parts),
                "cat": f"{name(schedule)},{entry.kind}",
                "ph": "X",
                "ts": start,
                "dur": end - start,
                "pid": process,
                "tid": rank,
                "cname": COLOURS[entry.kind],
                "args": _arguments(entry),
            }
    for rank, own in enumerate(schedule.ranks):
        for entry, start in zip(own, timeline.start[rank], strict=True):
            for action in entry.parts:
                sender, begin, end = senders.get(_received(action), (rank, 0, 0))
                if sender != rank and end > begin:
                    what = "activation" if action.kind == "F" else "gradient"
                    arrow = {"name": what, "cat": "send", "id": next(identities), "pid": process}
                    yield arrow | {"ph": "s", "ts": end - 1, "tid": sender}  # inside of the slice it leaves
                    yield arrow | {"ph": "f", "bp": "e", "ts": start, "tid": rank}


def _sent(action: Action) -> tuple[str, int, int]:
    """A forward sends its output, I and B the gradient of their input."""
    return ("F" if action.kind == "F" else "I", action.stage, action.microbatch)


def _received(action: Action) -> tuple[str, int, int]:
    """What an action waits for: the stage before it forward, the one behind it backward; W for nothing."""
    if action.kind == "W":
        return ("", 0, 0)
    kind, stage, microbatch = _sent(action)
    return (kind, stage - 1 if kind == "F" else stage + 1, microbatch)


def _named(event: str, process: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"name": event, "ph": "M", "pid": process, "tid": thread, "args": args}


def _arguments(entry: Entry) -> dict[str, int]:
    if len(entry.parts) == 1:
        return {"stage": entry.parts[0].stage, "microbatch": entry.parts[0].microbatch}
    return {
        f"{action.kind} {what}": number
        for action in entry.parts
        for what, number in (("stage", action.stage), ("microbatch", action.microbatch))
    }
