"""The recorded orders of published implementations, as schedules: see recordings/pipeline/README.md."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule

FOLDER = Path(__file__).parent / "recordings" / "pipeline"


@cache
def orders() -> dict[str, dict[str, Any]]:
    """Everything that was recorded, by name."""
    with gzip.open(FOLDER / "orders.json.gz", "rt", encoding="utf-8") as file:
        return {order["name"]: order for order in json.load(file)}


def entry(row: list[Any]) -> Entry:
    kind, *numbers = row
    if kind == "FB":
        return Pair(Action("F", *numbers[:2]), Action("B", *numbers[2:]))
    return Action(kind, *numbers)


def recorded(name: str) -> Schedule:
    order = orders()[name]
    return Schedule(
        name,
        order["M"],
        order["num_stages"],
        tuple(tuple(stages) for stages in order["placement"]),
        tuple(tuple(entry(row) for row in rank) for rank in order["ranks"]),
    )
