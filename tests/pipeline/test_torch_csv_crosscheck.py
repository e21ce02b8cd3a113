"""Torch reads what is written here, and what torch writes is read.  Group `crosscheck`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refimpl.pipeline import exchange, torch_csv
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Entry

pytestmark = pytest.mark.crosscheck
torch = pytest.importorskip("torch", reason="torch is not installed")

RANKS = 4
# What torch has a class for that writes files, its chunks, the rule.
CLASSES = [
    ("ScheduleInterleaved1F1B", 2, "interleaved"),
    ("ScheduleInterleaved1F1B", 3, "interleaved"),
    ("ScheduleInterleavedZeroBubble", 1, "zb1p"),
    ("ScheduleZBVZeroBubble", 2, "zbv"),
    ("ScheduleDualPipeV", 2, "dualpipev"),
]


@pytest.fixture(scope="module")
def schedules() -> Iterator[Any]:
    """The module of schedules, and a process group of four ranks that sends nothing."""
    from torch.distributed.pipelining import schedules
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(backend="fake", rank=0, world_size=RANKS, store=FakeStore())
    yield schedules
    torch.distributed.destroy_process_group()


def stages(indices: tuple[int, ...], count: int) -> list[Any]:
    from torch.distributed.pipelining import PipelineStage

    return [PipelineStage(torch.nn.Linear(2, 2), i, count, torch.device("cpu")) for i in indices]


def own(name: str, chunks: int) -> list[Any]:
    """Rank 0's stages."""
    placement = plan(name, RANKS, 8, chunks if name == "interleaved" else None).placement[0]
    return stages(placement, RANKS * chunks)


@pytest.mark.parametrize("microbatches", [8, 12])
@pytest.mark.parametrize(("kind", "chunks", "name"), CLASSES)
class TestBoth:
    def schedule(self, name: str, microbatches: int, chunks: int) -> Any:
        return plan(name, RANKS, microbatches, chunks if name == "interleaved" else None)

    def test_what_torch_writes_is_read(
        self, kind: str, chunks: int, name: str, microbatches: int, schedules: Any, tmp_path: Path
    ) -> None:
        theirs = getattr(schedules, kind)(own(name, chunks), microbatches)
        for form in ("compute_only", "compute_comms"):
            path = tmp_path / f"{form}.csv"
            theirs._dump_csv(path, format=form)
            found, left_out = exchange.read(path)
            schedule = self.schedule(name, microbatches, chunks)
            assert found.ranks == schedule.ranks
            assert (found.stages, found.microbatches) == (schedule.stages, microbatches)
            assert found.placement == schedule.placement
            assert (left_out > 0) == (form == "compute_comms")

    def test_what_is_written_is_what_torch_writes(
        self, kind: str, chunks: int, name: str, microbatches: int, schedules: Any, tmp_path: Path
    ) -> None:
        theirs = getattr(schedules, kind)(own(name, chunks), microbatches)
        for rank, actions in theirs.pipeline_order.items():  # where torch waits it writes an empty cell
            theirs.pipeline_order[rank] = [action for action in actions if action is not None]
        theirs._dump_csv(tmp_path / "theirs.csv", format="compute_only")
        ours = torch_csv.text(self.schedule(name, microbatches, chunks))
        assert ours.encode() == (tmp_path / "theirs.csv").read_bytes()


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb1p", 1), ("zbv", 2), ("dualpipev", 2)],
)
def test_torch_loads_what_is_written(name: str, chunks: int, schedules: Any, tmp_path: Path) -> None:
    schedule = plan(name, RANKS, 10)
    (tmp_path / "ours.csv").write_bytes(torch_csv.text(schedule).encode())
    runtime = schedules._PipelineScheduleRuntime(own(name, chunks), 10)
    runtime._load_csv(tmp_path / "ours.csv")  # validates the order and derives its communication
    assert runtime.stage_index_to_group_rank == {
        stage: rank for rank, held in enumerate(schedule.placement) for stage in held
    }
    for rank, entries in enumerate(schedule.ranks):
        assert [parts(action) for action in runtime.pipeline_order[rank]] == [
            tuple(map(tuple, entry.parts)) for entry in entries
        ]


def parts(action: Any) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (one.computation_type.value, one.stage_index, one.microbatch_index)
        for one in action.sub_actions or (action,)
    )


def test_torch_reads_the_cells_of_dualpipe_and_refuses_its_placement(schedules: Any, tmp_path: Path) -> None:
    schedule = plan("dualpipe", RANKS, 10)
    path = tmp_path / "ours.csv"
    path.write_bytes(torch_csv.text(schedule).encode())
    rows: list[tuple[Entry, ...]] = list(schedule.ranks)
    for line, entries in zip(path.read_text().splitlines(), rows, strict=True):
        found = [parts(schedules._Action.from_str(cell)) for cell in line.split(",")]
        assert found == [tuple(map(tuple, entry.parts)) for entry in entries]
    with pytest.raises(AssertionError, match="assigned to both"):
        schedules._PipelineScheduleRuntime(stages((0,), RANKS), 10)._load_csv(path)
