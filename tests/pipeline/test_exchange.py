"""Schedules in files: what is written can be read, and what is read is not trusted.  SPEC PIPE-40, -41."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_orders import orders, recorded
from support import one_sentence

from refimpl.errors import Error, Invalid, Unreadable
from refimpl.pipeline import exchange, summary
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import MOST, Action, Pair, Schedule
from refimpl.pipeline.simulate import Durations, simulate

SMALL: dict[str, Any] = {
    "schedule": "mine",
    "P": 2,
    "M": 1,
    "chunks_per_rank": 1,
    "num_stages": 2,
    "placement": [[0], [1]],
    "ranks": [[["F", 0, 0], ["B", 0, 0]], [["F", 1, 0], ["I", 1, 0], ["W", 1, 0]]],
}
READ = Schedule(
    "mine",
    1,
    2,
    ((0,), (1,)),
    ((Action("F", 0, 0), Action("B", 0, 0)), (Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0))),
)
PLANNED = [
    ("gpipe", 3, 4, None),
    ("1f1b", 1, 1, None),
    ("interleaved", 3, 5, 3),
    ("zb1p", 4, 7, None),
    ("zbv", 3, 6, None),
    ("dualpipe", 4, 10, None),
    ("dualpipev", 2, 5, None),
]


def written(folder: Path, value: Any, name: str = "mine.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    assert exchange.read(written(tmp_path, SMALL)) == (READ, 0)


def test_what_is_written_by_hand_is_what_is_written() -> None:
    assert json.loads(exchange.to_json(READ)) == SMALL


def test_metrics_and_unknown_keys_stand_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL | {"metrics": {"makespan": "x"}, "source": None, "schedules": []})
    assert exchange.read(path).schedule == READ


def test_a_pair_has_its_forward_first(tmp_path: Path) -> None:
    value = SMALL | {"ranks": [[["FB", 0, 0, 1, 2]], []], "M": 3}
    found = exchange.read(written(tmp_path, value)).schedule
    assert found.ranks[0] == (Pair(Action("F", 0, 0), Action("B", 1, 2)),)


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), PLANNED)
def test_every_schedule_comes_back(
    name: str, ranks: int, microbatches: int, chunks: int | None, tmp_path: Path
) -> None:
    schedule = plan(name, ranks, microbatches, chunks)
    metrics = summary.metrics(simulate(schedule, Durations(2, 3, 1)))
    path = written(tmp_path, exchange.to_json(schedule, metrics))
    assert exchange.read(path).schedule == schedule
    assert json.loads(path.read_text())["metrics"]["makespan"] > 0


@pytest.mark.parametrize("name", [name for name in orders() if "_P4_M8_" in name])
def test_recordings_are_of_this_schema(name: str, tmp_path: Path) -> None:
    order = orders()[name]
    found = exchange.read(written(tmp_path, order)).schedule
    assert found.ranks == recorded(name).ranks
    assert exchange.to_dict(found) == {key: order[key] for key in exchange.KEYS}


def test_the_suffix_says_what_a_file_is_and_else_its_beginning(tmp_path: Path) -> None:
    rows = "0F0,0B0\n1F0,1B0\n"
    assert exchange.read(written(tmp_path, rows, "a.csv")).schedule.name == "a"
    assert exchange.read(written(tmp_path, rows, "b")).schedule.stages == 2
    assert exchange.read(written(tmp_path, json.dumps(SMALL), "c.txt")).schedule == READ
    with pytest.raises(Unreadable, match="not JSON"):
        exchange.read(written(tmp_path, rows, "d.JSON"))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name != key}


def with_ranks(*ranks: Any) -> dict[str, Any]:
    return SMALL | {"ranks": list(ranks)}


WRONG: list[tuple[Any, tuple[str, ...]]] = [
    *((without(key), (f"no {key}",)) for key in SMALL),
    ({}, ("no schedule",)),
    (SMALL | {"schedule": 3}, ("3 as schedule", "printable")),
    (SMALL | {"schedule": "a\x1b[31m"}, ("schedule", "printable")),
    (SMALL | {"P": 0}, ("0 as P", "from 1 on")),
    (SMALL | {"P": True}, ("true as P",)),
    (SMALL | {"M": 1.0}, ("1.0 as M",)),
    (SMALL | {"M": -1}, ("-1 as M",)),
    (SMALL | {"M": "1"}, ('"1" as M',)),
    (SMALL | {"num_stages": None}, ("null as num_stages",)),
    (SMALL | {"chunks_per_rank": 2}, ("2 as chunks_per_rank", "placement", "1")),
    (SMALL | {"P": 3}, ("2 entries as placement", "3 ranks")),
    (SMALL | {"placement": [[0], 1]}, ("placement", "2 ranks")),
    (SMALL | {"placement": [[0], [2]]}, ("[2] at placement[1]", "0 to 1")),
    (SMALL | {"placement": [[0], [-1]]}, ("[-1] at placement[1]",)),
    (SMALL | {"placement": [[0, 0], [1]], "chunks_per_rank": 2}, ("[0, 0] at placement[0]",)),
    (SMALL | {"placement": [[0], [[1]]]}, ("[[1]] at placement[1]",)),
    (SMALL | {"ranks": [[]]}, ("1 entries as ranks", "2 ranks")),
    (SMALL | {"ranks": "FB"}, ('"FB" as ranks',)),
    (with_ranks([["Q", 0, 0]], []), ('["Q", 0, 0] at ranks[0][0]', '"F", "B", "I" or "W"')),
    (with_ranks([], [["F", 0, 0], ["F", 0]]), ('["F", 0] at ranks[1][1]',)),
    (with_ranks([["F", 0, 0, 0]], []), ("ranks[0][0]",)),
    (with_ranks([["FB", 0, 0]], []), ("ranks[0][0]",)),
    (with_ranks([["F", 0, True]], []), ("true] at ranks[0][0]",)),
    (with_ranks([["F", 0.0, 0]], []), ("ranks[0][0]",)),
    (with_ranks([["F", 0, -1]], []), ("-1] at ranks[0][0]",)),
    (with_ranks([[]], []), ("[] at ranks[0][0]",)),
    (with_ranks(["F00"], []), ('"F00" at ranks[0][0]',)),
    (with_ranks([{"F": 0}], []), ("ranks[0][0]",)),
    (with_ranks([["x" * 500]], []), ("xxx at ranks[0][0]",)),
    (SMALL | {"M": MOST}, ("stages times microbatches", str(MOST))),
    (SMALL | {"M": 10**400}, ("stages times microbatches",)),
    ([SMALL], ("list", "JSON object")),
    ({"schedules": [SMALL, SMALL]}, ("2 schedules to compare", "must have one")),
]


@pytest.mark.parametrize(("value", "fragments"), WRONG, ids=[fragments[0] for _, fragments in WRONG])
def test_what_breaks_the_schema_is_one_sentence(
    value: Any, fragments: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(Invalid) as caught:
        exchange.read(written(tmp_path, value))
    one_sentence(caught, "mine.json", *fragments)


@pytest.mark.parametrize(
    "text", ["", "{", "nonsense", '{"P": NaN}', '{"P": 1, "P": 1}', "[" * 100_000, "\ufeff{}", '{"a": 1e999}']
)
def test_what_is_no_json_is_one_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(Error) as caught:
        exchange.read(written(tmp_path, text))
    one_sentence(caught, "mine.json")


def test_a_file_that_is_not_there_or_is_a_folder_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(Unreadable) as caught:
            exchange.read(path)
        one_sentence(caught, str(path))


@pytest.mark.parametrize("name", ["big.json", "big.csv"])
def test_a_large_file_is_refused_before_it_is_parsed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(exchange.LIMIT + 1)  # sparse
    with pytest.raises(Unreadable, match=f"larger than {exchange.LIMIT} bytes"):
        exchange.read(path)


@pytest.mark.parametrize(("name", "piece"), [("many.json", b"["), ("many.csv", b","), ("rows.csv", b"\n")])
def test_so_is_one_of_too_many_parts(name: str, piece: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(piece * (8 * exchange.ENTRIES + 1))
    with pytest.raises(Unreadable, match="too many parts"):
        exchange.read(path)


def test_too_many_ranks_are_refused(tmp_path: Path) -> None:
    ranks = exchange.RANKS + 1
    value = SMALL | {"P": ranks, "placement": [[0]] * ranks, "ranks": [[]] * ranks}
    with pytest.raises(Invalid, match=f"{ranks} ranks"):
        exchange.read(written(tmp_path, value))
    with pytest.raises(Invalid, match=f"{ranks} ranks"):
        exchange.read(written(tmp_path, "0F0\n" * ranks, "mine.csv"))
