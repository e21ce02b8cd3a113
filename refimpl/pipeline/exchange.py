"""Schedules in files: JSON, and reading whatever others wrote.  SPEC PIPE-40, PIPE-41.

The JSON object has the keys schedule, P, M, chunks_per_rank, num_stages, placement, ranks.  An action is
["F" | "B" | "I" | "W", stage, microbatch] or, overlapped, ["FB", stage, microbatch, stage, microbatch], the
forward first.  Beside them stands what a simulation found, under "metrics"; readers do without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final, NamedTuple

from refimpl.config.jsonfile import parse_object
from refimpl.errors import Invalid, Unreadable
from refimpl.pipeline import torch_csv
from refimpl.pipeline.schedule import MOST, Action, Entry, Pair, Schedule, numbered

LIMIT: Final = 1 << 26  # bytes of a file
RANKS: Final = 1 << 12
ENTRIES: Final = 4 * MOST  # of all ranks
NAME: Final = 60  # characters
KEYS: Final = ("schedule", "P", "M", "chunks_per_rank", "num_stages", "placement", "ranks")
_FORM: Final = 'an action must be ["F", "B", "I" or "W", stage, microbatch] or ["FB", and both of a pair]'


class Given(NamedTuple):
    """What a file holds; left_out counts the communication of a CSV file, which a schedule does not have."""

    schedule: Schedule
    left_out: int = 0


def read(path: str | PathLike[str]) -> Given:
    """A schedule from JSON or from PyTorch's CSV, told apart by the suffix, else by the first character.
    Nothing in the file is trusted, and the schedule need not be legal.  Raises Unreadable, Invalid."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}), but it must be JSON or CSV.") from None
    if len(data) > LIMIT:
        raise Unreadable(f"{path} is larger than {LIMIT} bytes, but it must be at most that.")
    if sum(data.count(mark) for mark in (b"[", b"{", b"\n")) > 2 * ENTRIES or data.count(b",") > 8 * ENTRIES:
        raise Unreadable(f"{path} has too many parts, but it must have at most {ENTRIES} actions.")
    suffix = path.suffix.lower()
    if suffix == ".json" or (suffix != ".csv" and data.lstrip()[:1] in (b"{", b"[")):
        return Given(from_dict(parse_object(data, str(path)), str(path)))
    ranks, left_out = torch_csv.parse(data, str(path))
    return Given(of_ranks(ranks, path.stem, str(path)), left_out)


def of_ranks(ranks: Sequence[Sequence[Entry]], name: str, what: str) -> Schedule:
    """A schedule with the stages, microbatches and placement that its actions name.  Raises Invalid."""
    actions = [action for own in ranks for entry in own for action in entry.parts]
    if not actions:
        raise Invalid(f"{what} has no action, but a schedule needs at least one.")
    stages = 1 + max(action.stage for action in actions)
    microbatches = 1 + max(action.microbatch for action in actions)
    _bounded(len(ranks), len(actions), stages, microbatches, what)
    placement = tuple(tuple(sorted({a.stage for e in own for a in e.parts})) for own in ranks)
    return Schedule(_named(name), microbatches, stages, placement, numbered(ranks))


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """The object of a schedule, without metrics."""
    values = (
        schedule.name,
        schedule.size,
        schedule.microbatches,
        max(map(len, schedule.placement), default=0),
        schedule.stages,
        [list(own) for own in schedule.placement],
        [[_listed(entry) for entry in own] for own in schedule.ranks],
    )
    return dict(zip(KEYS, values, strict=True))


def to_json(schedule: Schedule, metrics: Mapping[str, Any] | None = None) -> str:
    """The file: a key to a line, and a rank to a line."""
    found = to_dict(schedule)
    lines = [f"  {json.dumps(key)}: {json.dumps(found[key])}" for key in KEYS[:-1]]
    ranks = ",\n".join(f"    {json.dumps(own, separators=(',', ':'))}" for own in found["ranks"])
    lines.append(f'  "ranks": [\n{ranks}\n  ]')
    if metrics is not None:
        lines.append(f'  "metrics": {json.dumps(metrics)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def several(found: Iterable[tuple[Schedule, Mapping[str, Any]]]) -> str:
    """A file of many, {"schedules": [...]}, each with its metrics."""
    return '{"schedules": [\n' + ",\n".join(to_json(*one).rstrip() for one in found) + "\n]}\n"


def from_dict(found: Mapping[str, Any], what: str) -> Schedule:
    """A schedule from a JSON object that `what` names.  Raises Invalid."""
    missing = [key for key in KEYS if key not in found]
    if missing and isinstance(found.get("schedules"), list):  # what `several` writes
        raise Invalid(f"{what} has {len(found['schedules'])} schedules to compare, but it must have one.")
    if missing:
        raise Invalid(f"{what} has no {missing[0]}, but it must have {', '.join(KEYS)}.")
    name, size, microbatches, chunks, stages = (found[key] for key in KEYS[:5])
    if not isinstance(name, str) or not name.isprintable():
        raise Invalid(f"{what} has {_shown(name)} as schedule, but it must be a printable text.")
    for key in KEYS[1:5]:
        if not _whole(found[key]) or found[key] < 1:
            raise Invalid(f"{what} has {_shown(found[key])} as {key}, but it must be a number from 1 on.")
    for key in KEYS[5:]:
        own = found[key]
        if not isinstance(own, list) or not all(isinstance(one, list) for one in own) or len(own) != size:
            count = f"{len(own)} entries" if isinstance(own, list) else _shown(own)
            raise Invalid(f"{what} has {count} as {key}, but it must be one list for each of {size} ranks.")
    _bounded(size, sum(map(len, found["ranks"])), stages, microbatches, what)
    placement = tuple(_placed(own, stages, r, what) for r, own in enumerate(found["placement"]))
    if max(map(len, placement)) != chunks:
        most = max(map(len, placement))
        raise Invalid(f"{what} has {chunks} as chunks_per_rank, but placement gives a rank up to {most}.")
    ranks = [[_entry(e, r, i, what) for i, e in enumerate(own)] for r, own in enumerate(found["ranks"])]
    return Schedule(_named(name), microbatches, stages, placement, numbered(ranks))


def _listed(entry: Entry) -> list[Any]:
    return [entry.kind, *(number for action in entry.parts for number in action[1:])]


def _entry(given: Any, rank: int, position: int, what: str) -> Entry:
    if isinstance(given, list) and given and all(_whole(number) and number >= 0 for number in given[1:]):
        match given:
            case ["FB", forward, f_microbatch, backward, b_microbatch]:
                return Pair(Action("F", forward, f_microbatch), Action("B", backward, b_microbatch))
            case ["F" | "B" | "I" | "W" as kind, stage, microbatch]:
                return Action(kind, stage, microbatch)
    raise Invalid(f"{what} has {_shown(given)} at ranks[{rank}][{position}], but {_FORM}.")


def _placed(own: Iterable[Any], stages: int, rank: int, what: str) -> tuple[int, ...]:
    found = tuple(own)
    if not all(_whole(stage) and 0 <= stage < stages for stage in found) or len(set(found)) != len(found):
        raise Invalid(
            f"{what} has {_shown(list(found))} at placement[{rank}], but it must be different stages "
            f"from 0 to {stages - 1}."
        )
    return found


def _bounded(ranks: int, actions: int, stages: int, microbatches: int, what: str) -> None:
    for count, limit, things in (
        (ranks, RANKS, "ranks"),
        (actions, ENTRIES, "actions"),
        (stages * microbatches, MOST, "stages times microbatches"),
    ):
        if count > limit:
            raise Invalid(f"{what} has {_shown(count)} {things}, but it must have at most {limit}.")


def _named(name: str) -> str:
    return name[:NAME] if name and name.isprintable() else "schedule"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return json.dumps(value)[:NAME]
