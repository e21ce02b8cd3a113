"""What a Gantt chart shows.  SPEC PIPE-44."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from refimpl.pipeline.gantt import Cell, Frame, Shading, chart
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action, Pair, Schedule
from refimpl.pipeline.simulate import Durations, simulate


def test_two_ranks_by_hand() -> None:
    found = chart(simulate(plan("gpipe", 2, 1), Durations(2, 1, 2, latency=1)))
    assert found.cells == (
        Cell(0, 0.0, 2.0, "F", 0, 0),
        Cell(0, 9.0, 12.0, "B", 0, 0),
        Cell(1, 3.0, 5.0, "F", 0, 0),
        Cell(1, 5.0, 8.0, "B", 0, 0),
    )
    assert (found.frames, found.shades, found.meaning, found.ranks) == ((), 1, "", 2)
    assert found.title == "GPipe, 2 ranks, 1 microbatch"
    assert found.result == "F 2, B 3, latency 1: makespan 12, idle 7 (58.3%)"


def test_a_pair_is_two_cells_that_share_its_time_as_f_and_b_do() -> None:
    f, b = Action("F", 0, 1), Action("B", 0, 0)
    schedule = Schedule(
        "mine", 2, 1, ((0,),), ((Action("F", 0, 0), Pair(f, b), Action("I", 0, 1), Action("W", 0, 1)),)
    )
    found = chart(simulate(schedule, Durations(2, 3, 3, FB=4)))
    assert found.cells[1:3] == (Cell(0, 2.0, 3.0, "F", 0, 1), Cell(0, 3.0, 6.0, "B", 0, 0))
    assert found.frames == (Frame(0, 2, 6),)
    assert found.title == "mine, 1 rank, 2 microbatches"
    assert found.result == "F 2, I 3, W 3, F&B 4: makespan 12, idle 0 (0.0%)"
    halves = chart(simulate(schedule, Durations(0, 0, 0, FB=4))).cells[1:3]
    assert [(cell.start, cell.end) for cell in halves] == [(0.0, 2.0), (2.0, 4.0)]


@pytest.mark.parametrize("name", RULES)
def test_cells_of_a_row_fill_its_busy_time_and_do_not_overlap(name: str) -> None:
    timeline = simulate(plan(name, 4, 10), Durations(3, 4, 2, FB=7, latency=1))
    found = chart(timeline)
    rows: dict[int, list[Cell]] = defaultdict(list)
    for cell in found.cells:
        rows[cell.rank].append(cell)
    assert len(found.cells) == len(list(timeline.schedule.actions()))
    for rank, cells in rows.items():
        assert all(one.end <= next_.start + 1e-9 for one, next_ in pairwise(cells))
        assert sum(cell.end - cell.start for cell in cells) == pytest.approx(timeline.busy[rank])
    assert max(cell.end for cell in found.cells) == found.makespan == timeline.makespan


def test_directions_of_dualpipe_are_shades() -> None:
    found = chart(simulate(plan("dualpipe", 4, 10), Durations(1, 1, 1)))
    assert {(cell.microbatch < 5, cell.shade) for cell in found.cells} == {(True, 0), (False, 1)}
    assert found.meaning == "light: microbatches that begin on device 0; dark: on device 3"


@pytest.mark.parametrize(
    ("name", "chunks", "meaning"),
    [
        ("1f1b", None, ""),
        ("zbv", None, "light: chunk 0 of a device; dark: chunk 1"),
        ("dualpipev", None, "light: chunk 0 of a device; dark: chunk 1"),
        ("interleaved", 4, "light to dark: chunks 0 to 3 of a device"),
    ],
)
def test_chunks_of_a_rank_are_shades(name: str, chunks: int | None, meaning: str) -> None:
    schedule = plan(name, 3, 9, chunks)
    shading = Shading.of(schedule)
    assert shading.meaning == meaning
    assert shading.count == len(schedule.placement[0])
    for rank, _, action in schedule.actions():
        assert shading.shade(rank, action) == sorted(schedule.placement[rank]).index(action.stage)
