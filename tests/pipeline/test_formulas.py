"""Formulas beside the simulation: true wherever they are said to apply, and not everywhere else."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

import pytest
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline import formulas, orders
from refimpl.pipeline.orders import follows
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Schedule
from refimpl.pipeline.simulate import Durations, sequence, simulate, timed


def drawn(rng: random.Random, stages: int) -> Durations:
    forward, inputs, weights = (rng.randint(0, 9) for _ in range(3))
    if rng.random() < 0.5:
        inputs, weights = forward, rng.choice((forward, rng.randint(0, forward)))
    both = forward + inputs + weights
    return Durations(
        forward,
        inputs,
        weights,
        B=rng.choice((None, None, None, rng.randint(0, 20))),
        FB=rng.choice((None, rng.randint(max(forward, inputs + weights), both), rng.randint(0, 2 * both))),
        latency=rng.choice((0, 0, 0, rng.randint(1, 9))),
        scale=rng.choice(((), (), (3,) * stages, tuple(rng.randint(1, 2) for _ in range(stages)))),
    )


@pytest.mark.parametrize("name", RULES)
def test_a_formula_is_true_wherever_it_applies(name: str) -> None:
    rng = random.Random(f"7 {name}")
    applied, not_true = [0, 0], [0, 0]
    for ranks in (1, 2, 3, 4, 6, 7):
        for microbatches in (1, 2, ranks, 2 * ranks - 1, 2 * ranks, 2 * ranks + 2, 3 * ranks + 1):
            for chunks in (2, 3) if name == "interleaved" else (None,):
                with suppress(Invalid):
                    schedule = plan(name, ranks, microbatches, chunks)
                    steps = sequence(schedule)
                    for _ in range(25):
                        timeline = timed(schedule, steps, drawn(rng, schedule.stages))
                        published, closed = formulas.beside(timeline)
                        at_span = published.meaning == formulas.SPAN
                        idle = timeline.idle_within_span if at_span else timeline.idle
                        same = max(idle) == published.value
                        if formulas.EVERY in published.reason:
                            same &= len(set(idle)) == 1
                        for i, (applies, equal) in enumerate(
                            ((published.applies, same), (closed.applies, closed.idle == timeline.idle))
                        ):
                            assert equal or not applies, (timeline.durations, published, closed)
                            applied[i] += applies
                            not_true[i] += not equal
    assert min(applied) > 20
    assert min(not_true) > 20  # the regions exclude something


def test_the_reference_points() -> None:
    times = Durations(2, 2, 2)
    for name, microbatches, makespan, idle in (
        ("1f1b", 16, 138, 42), ("zb1p", 16, 110, 14), ("dualpipe", 16, 108, 12),
        ("1f1b", 20, 162, 42), ("zb1p", 20, 134, 14), ("dualpipe", 20, 132, 12),
    ):  # fmt: skip
        timeline = simulate(plan(name, 8, microbatches), times)
        assert (timeline.makespan, max(timeline.idle)) == (makespan, idle)
        published = formulas.published(name, 8, microbatches, times)
        assert (published.value, published.applies) == (idle, True)


def test_an_overlap_that_gains_makes_outer_ranks_idle_less() -> None:
    timeline = simulate(plan("dualpipe", 8, 16), Durations(2, 2, 2, FB=5))
    assert timeline.idle == (7, 8, 9, 9, 9, 9, 8, 7)
    published, closed = formulas.beside(timeline)
    assert (published.value, published.applies, closed.idle) == (9, True, timeline.idle)
    assert formulas.MOST in published.reason


def test_the_two_meanings_of_bubble_differ_for_zb_v() -> None:
    timeline = simulate(plan("zbv", 4, 8), Durations(1, 1, 1))
    assert timeline.idle_within_span == (0, 0, 0, 0)
    assert timeline.idle == (3, 3, 3, 3)
    assert formulas.beside(timeline)[0].meaning == formulas.SPAN


@pytest.mark.parametrize(
    ("name", "times", "word"),
    [
        ("zb1p", Durations(2, 3, 4), "W <= min(F, I)"),
        ("dualpipe", Durations(2, 3, 1), "F = I >= W"),
        ("dualpipe", Durations(2, 2, 1, FB=2), "max(F, B) <= F&B"),
        ("zbv", Durations(2, 2, 1), "F = I = W"),
        ("1f1b", Durations(2, 2, 1, latency=1), "latency 0"),
        ("gpipe", Durations(2, 2, 1, scale=(1, 1, 1, 2)), "stages of the same scale"),
        ("dualpipev", Durations(2, 2, 2, B=5), "B = I + W"),
    ],
)
def test_a_formula_says_what_is_missing(name: str, times: Durations, word: str) -> None:
    published = formulas.published(name, 4, 16, times)
    assert not published.applies
    assert word in published.reason


def test_too_few_microbatches_are_said_too() -> None:
    assert "M >= 2 P" in formulas.published("dualpipe", 4, 6, Durations(1, 1, 1)).reason
    assert "M >= P" in formulas.published("zb1p", 4, 3, Durations(1, 1, 1)).reason


def test_an_unknown_schedule_has_no_formula() -> None:
    for formula in (formulas.published, formulas.closed):
        with pytest.raises(Invalid) as caught:
            formula("zb2p", 4, 8, Durations(1, 1, 1))
        one_sentence(caught, "zb2p", "dualpipe")


def named(schedule: Schedule, name: str) -> Schedule:
    return replace(schedule, name=name)


def swapped(schedule: Schedule) -> Schedule:
    """The first two entries of rank 0 the other way round."""
    first, *others = schedule.ranks
    return replace(schedule, ranks=((first[1], first[0], *first[2:]), *others))


@pytest.mark.parametrize(
    "schedule",
    [
        named(plan("gpipe", 4, 8), "zb1p"),
        named(plan("1f1b", 4, 8), "gpipe"),
        named(plan("zbv", 4, 8), "dualpipev"),
        named(plan("dualpipev", 4, 8), "interleaved"),
        named(plan("1f1b", 3, 6), "dualpipe"),  # there is none for 3 ranks
        swapped(plan("gpipe", 4, 8)),
        swapped(plan("dualpipe", 4, 8)),
        swapped(plan("interleaved", 4, 8, 3)),
    ],
    ids=lambda one: one.name,
)
def test_what_is_only_named_like_a_rule_does_not_get_its_formula(schedule: Schedule) -> None:
    for times in (Durations(1, 1, 1), Durations(2, 3, 1, latency=1)):
        for formula in formulas.beside(simulate(schedule, times)):
            assert not formula.applies
            assert formula.reason == f"its order is not that of {schedule.name}"


@pytest.mark.parametrize(
    ("ranks", "microbatches", "chunks", "group"),
    [
        (4, 8, 2, None),
        (4, 8, 2, 8),
        (3, 11, 3, 4),
        (4, 2, 3, None),
        (4, 9, 1, 9),
        (1, 5, 2, 3),
        (1, 1, 1, None),
    ],
)
def test_interleaved_is_itself_for_every_group_size(
    ranks: int, microbatches: int, chunks: int, group: int | None
) -> None:
    schedule = plan("interleaved", ranks, microbatches, chunks, group)
    assert follows(schedule)
    assert not follows(swapped(schedule))


def test_the_order_is_planned_once_for_all_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(orders, "plan", lambda *given: planned.append(given) or plan(*given))
    schedule = plan("zb1p", 4, 9)
    for forward in (1, 2, 3):
        formulas.beside(simulate(schedule, Durations(forward, 1, 1)))
    assert planned == [("zb1p", 4, 9)]


@pytest.mark.parametrize(
    ("at", "word"),
    [
        ((0, 3), "ranks is 0"),
        ((-2, 3), "ranks is -2"),
        ((4, 0), "microbatches is 0"),
        ((4, 8, 0), "chunks is 0"),
        ((4, 8, -1), "chunks is -1"),
    ],
)
def test_a_formula_needs_ranks_microbatches_and_chunks(at: tuple[int, ...], word: str) -> None:
    ranks, microbatches, *chunks = at
    for formula in (formulas.published, formulas.closed):
        with pytest.raises(Invalid) as caught:
            formula("1f1b", ranks, microbatches, Durations(1, 1, 1), *chunks)
        one_sentence(caught, word, "above 0")
