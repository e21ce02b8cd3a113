"""Peaks of live activations: by hand, and the published table for every legal size."""

from __future__ import annotations

from contextlib import suppress

import pytest
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline import memory
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action, Pair, Schedule

ORDER = (
    Action("F", 0, 0),
    Action("F", 0, 1),
    Action("I", 0, 0),
    Action("F", 0, 2),
    Action("W", 0, 0),
    Pair(Action("F", 0, 3), Action("B", 0, 1)),
)
ONE = Schedule("by hand", 4, 1, ((0,),), (ORDER,))


@pytest.mark.parametrize(
    ("release", "backward_first", "held"),
    [
        ("W", False, (1, 2, 2, 3, 3, 3)),
        ("W", True, (1, 2, 2, 3, 3, 2)),
        ("I", False, (1, 2, 2, 2, 2, 3)),
        ("I", True, (1, 2, 2, 2, 2, 2)),
    ],
)
def test_an_activation_lives_from_its_forward_to_its_release(
    release: str, backward_first: bool, held: tuple[int, ...]
) -> None:
    assert memory.held(ORDER, release, backward_first) == held
    assert memory.peak(ONE, release, backward_first) == (max(held),)


@pytest.mark.parametrize("name", RULES)
def test_peaks_are_those_of_the_published_table(name: str) -> None:
    sizes = 0
    for ranks in range(1, 7):
        for microbatches in range(1, 4 * ranks + 1):
            for chunks in (1, 2, 3) if name == "interleaved" else (None,):
                with suppress(Invalid):
                    schedule = plan(name, ranks, microbatches, chunks)
                    sizes += 1
                    for rule in (("W", False), ("I", False), ("W", True), ("I", True)):
                        assert memory.expected(schedule, *rule)[1] == memory.peak(schedule, *rule)
    assert sizes > 5


def test_table_2_of_the_report() -> None:
    pp = 8
    assert max(memory.peak(plan("1f1b", pp, 32))) == max(memory.peak(plan("zb1p", pp, 32))) == pp
    assert set(memory.peak(plan("dualpipe", pp, 32))) == {pp + 1}
    assert set(memory.peak(plan("dualpipev", pp // 2, 32))) == {pp + 1}
    assert set(memory.parameters(plan("1f1b", pp, 32))) == {1}
    for dual in (plan("dualpipe", pp, 32), plan("dualpipev", pp // 2, 32)):
        assert set(memory.parameters(dual)) == {2}


def test_dualpipe_alone_has_every_stage_twice() -> None:
    for name in RULES:
        assert set(memory.copies(plan(name, 4, 8))) == {2 if name == "dualpipe" else 1}


@pytest.mark.parametrize("name", RULES)
def test_a_rank_holds_as_many_stages_as_the_clauses_say(name: str) -> None:
    """PIPE-27, PIPE-38: and it holds 1/P of the model, but 2/P in DualPipe."""
    schedule = plan(name, 4, 8, 3 if name == "interleaved" else None)
    stages = {"interleaved": 3, "zbv": 2, "dualpipe": 2, "dualpipev": 2}.get(name, 1)
    assert memory.parameters(schedule) == (stages,) * 4
    assert stages * 4 == schedule.stages * (2 if name == "dualpipe" else 1)


def test_a_release_has_to_be_known() -> None:
    with pytest.raises(Invalid) as caught:
        memory.peak(ONE, "B")
    one_sentence(caught, "'B'", "'W'", "'I'")
