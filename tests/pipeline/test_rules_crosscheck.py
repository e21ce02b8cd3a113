"""The rules against PyTorch's own schedule classes, for sizes that were never recorded.  Group `crosscheck`.

The classes plan all ranks when they are made, from the stages of rank 0 alone.  GPipe and 1F1B are executed
instead, on a stage that only writes down what it is asked for: their plans are not what they do.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from refimpl.errors import Invalid
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Entry, Pair

pytestmark = pytest.mark.crosscheck
schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="torch is not installed")


class Stage:
    """One stage as far as the schedules look at it when they plan, and a record of what they execute."""

    def __init__(self, index: int, ranks: int, stages: int) -> None:
        self.stage_index = index
        self.group_rank = 0
        self.group_size = ranks
        self.num_stages = stages
        self.stage_index_to_group_rank: Any = None
        self.is_first = index == 0
        self.is_last = index == stages - 1
        self.has_backward = True
        self.submod = None
        self.done: list[Entry] = []

    def get_fwd_recv_ops(self, _: int) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        self.done.append(Action("F", self.stage_index, microbatch))

    def backward_one_chunk(self, microbatch: int, **_: Any) -> None:
        self.done.append(Action("B", self.stage_index, microbatch))

    def perform_reduce_grad(self, _: int) -> None:
        pass


def executed(name: str, ranks: int, microbatches: int) -> list[list[Entry]]:
    """What a class with one stage per rank does, rank by rank."""
    stages = [Stage(rank, ranks, ranks) for rank in range(ranks)]
    for stage in stages:
        schedule = getattr(schedules, name)(stage, microbatches)
        schedule._initialize_stage = lambda *_: None
        schedule._step_microbatches([()] * microbatches, [{}] * microbatches)
    return [stage.done for stage in stages]


def entry(action: Any) -> Entry:
    if action.sub_actions:
        return Pair(*(Action(a.computation_type.value, *_numbers(a)) for a in action.sub_actions))
    return Action(action.computation_type.value, *_numbers(action))


def _numbers(action: Any) -> tuple[int, int]:
    return action.stage_index, action.microbatch_index


def planned(name: str, ranks: int, microbatches: int, indices: list[int]) -> list[list[Entry]]:
    """What a class with several stages per rank means to do."""
    stages = [Stage(index, ranks, ranks * len(indices)) for index in indices]
    order = getattr(schedules, name)(stages, microbatches).pipeline_order
    return [[entry(action) for action in order[rank] if action is not None] for rank in range(ranks)]


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    some = [(draw.randint(1, 12), draw.randint(1, 60)) for _ in range(count)]
    return [*some, (16, 64), (1, 1), (9, 2)]


def agrees(
    rule: str, name: str, size: tuple[int, int], indices: list[int] | None, chunks: int | None = None
) -> bool:
    """Compares, or finds that both refuse; False if PyTorch alone refuses."""
    try:
        expected = executed(name, *size) if indices is None else planned(name, *size, indices)
    except ValueError:
        expected = None
    try:
        found = plan(rule, *size, chunks)
    except Invalid:
        assert expected is None, size
        return True
    if expected is None:
        return False
    assert found.ranks == tuple(tuple(own) for own in expected), size
    return True


def test_gpipe() -> None:
    assert all(agrees("gpipe", "ScheduleGPipe", size, None) for size in sizes(1, 30))


def test_1f1b_and_pytorch_alone_refuses_fewer_microbatches_than_ranks() -> None:
    for ranks, microbatches in sizes(2, 30):
        assert agrees("1f1b", "Schedule1F1B", (ranks, microbatches), None) == (microbatches >= ranks)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6])
def test_interleaved_agrees_and_refuses_with_pytorch(chunks: int) -> None:
    for ranks, microbatches in sizes(3 + chunks, 30):
        indices = list(range(0, ranks * chunks, ranks))
        assert agrees("interleaved", "ScheduleInterleaved1F1B", (ranks, microbatches), indices, chunks)


def test_zb1p_and_pytorch_alone_refuses_unequal_rounds() -> None:
    for ranks, microbatches in sizes(11, 30):
        equal = microbatches % max(1, microbatches // ranks) == 0
        assert agrees("zb1p", "ScheduleInterleavedZeroBubble", (ranks, microbatches), [0]) == equal


@pytest.mark.parametrize(
    ("rule", "name"), [("zbv", "ScheduleZBVZeroBubble"), ("dualpipev", "ScheduleDualPipeV")]
)
def test_the_vs_agree_and_refuse_with_pytorch(rule: str, name: str) -> None:
    for ranks, microbatches in sizes(12, 40):
        assert agrees(rule, name, (ranks, microbatches), [0, 2 * ranks - 1])
