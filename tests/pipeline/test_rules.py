"""The rules of the schedules, against what the published implementations do.  SPEC PIPE-2 to PIPE-11."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from recorded_orders import orders, recorded
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline.check import check
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import MOST, Action, Pair, Schedule

# How a recording's name begins -> the rule.  What sail's 1F1B and vpp and Megatron's 1F1B did agrees as well.
REFERENCES = {
    "torch_gpipe": "gpipe",
    "torch_1f1b": "1f1b",
    "megatron_1f1b": "1f1b",
    "sail_1f1b": "1f1b",
    "torch_interleaved1f1b": "interleaved",
    "megatron_interleaved": "interleaved",
    "sail_vpp": "interleaved",
    "torch_interleavedzerobubble": "zb1p",  # with one chunk per rank
    "torch_zbvzerobubble": "zbv",
    "deepseek_dualpipe": "dualpipe",
    "deepseek_dualpipev": "dualpipev",
    "torch_dualpipev": "dualpipev",
}


def pairs_of_rule_and_order() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, order in orders().items():
        source = name.split("_P")[0].split("_G")[0]
        rule = REFERENCES.get(source)
        if rule is not None and not (rule == "zb1p" and order["chunks_per_rank"] > 1):
            yield rule, order


def planned(rule: str, order: dict[str, Any]) -> Schedule:
    chunks = order["chunks_per_rank"] if rule == "interleaved" else None
    group = order.get("microbatch_group_size_per_vp_stage") if rule == "interleaved" else None
    return plan(rule, order["P"], order["M"], chunks, group)


COMPARED = list(pairs_of_rule_and_order())


def test_the_recordings_are_all_there() -> None:
    count = {rule: len([1 for name, _ in COMPARED if name == rule]) for rule in RULES}
    assert count == {
        "gpipe": 27,
        "1f1b": 73,
        "interleaved": 250,
        "zb1p": 26,
        "zbv": 27,
        "dualpipe": 13,
        "dualpipev": 38,
    }


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_gives_every_recorded_order(rule: str) -> None:
    for name, order in COMPARED:
        if name == rule:
            expected = recorded(order["name"])
            found = planned(rule, order)
            assert found.ranks == expected.ranks, order["name"]
            assert found.stages == expected.stages, order["name"]
            assert [set(own) for own in found.placement] == [set(own) for own in expected.placement]


def text(schedule: Schedule, rank: int) -> str:
    """A rank's order in one line: I1.4 is I of stage 1 on microbatch 4."""
    words = [
        "&".join(f"{a.kind}{a.stage}.{a.microbatch}" for a in entry.parts) for entry in schedule.ranks[rank]
    ]
    return " ".join(words)


class TestByHand:
    def test_gpipe(self) -> None:
        assert text(plan("gpipe", 2, 3), 1) == "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2"

    def test_1f1b_warms_up_with_one_forward_per_rank_behind(self) -> None:
        schedule = plan("1f1b", 3, 4)
        assert text(schedule, 0) == "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3"
        assert text(schedule, 2) == "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3"

    def test_interleaved_takes_a_group_through_one_chunk_after_the_other(self) -> None:
        schedule = plan("interleaved", 2, 4, chunks=2)
        assert text(schedule, 1) == (
            "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"
        )

    def test_interleaved_has_the_table_of_the_megatron_comment(self) -> None:
        # "PP2 N3M5 with VP2": microbatches 0 1 2 0 1 2 3 4 3 4 in chunks 0 0 0 1 1 1 0 0 1 1
        forwards = [a for a in plan("interleaved", 2, 5, 2, 3).ranks[0] if a.kind == "F"]
        assert [a.parts[0].microbatch for a in forwards] == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
        assert [a.parts[0].stage // 2 for a in forwards] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]

    def test_zb1p_is_late_with_the_weights_by_the_rank(self) -> None:
        assert text(plan("zb1p", 3, 3), 2) == "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 W2.1 W2.2"
        assert text(plan("zb1p", 3, 3), 0) == "F0.0 F0.1 F0.2 I0.0 W0.0 I0.1 W0.1 I0.2 W0.2"

    def test_dualpipe_goes_through_its_eight_steps(self) -> None:
        schedule = plan("dualpipe", 4, 8)
        assert text(schedule, 0) == (
            "F0.0 F0.1 F0.2 F3.4 I3.4 W3.4 F3.5 F0.3&B3.5 F3.6&B0.0 B3.6 F3.7&B0.1 B3.7 I0.2 W0.2 I0.3 W0.3"
        )
        assert text(schedule, 1) == (
            "F1.0 F2.4 F1.1 F2.5 F1.2 B2.4 F2.6&B1.0 F1.3&B2.5 F2.7&B1.1 B2.6 B1.2 I2.7 I1.3 W2.7 W1.3"
        )

    def test_the_second_half_of_dualpipe_mirrors_the_first(self) -> None:
        schedule = plan("dualpipe", 6, 14)

        def mirrored(action: Action) -> Action:
            return action._replace(microbatch=(action.microbatch + 7) % 14)

        for rank in range(3):
            image = [
                Pair(mirrored(e.forward), mirrored(e.backward)) if isinstance(e, Pair) else mirrored(e)
                for e in schedule.ranks[rank]
            ]
            assert image == list(schedule.ranks[5 - rank])


# Every legal pair up to these sizes, and beyond what any source was run for.
SMALL = [(ranks, microbatches) for ranks in range(1, 8) for microbatches in range(1, 23)]


@pytest.mark.parametrize("rule", RULES)
def test_every_schedule_is_legal(rule: str) -> None:
    refused = 0
    for ranks, microbatches in SMALL:
        try:
            schedule = plan(rule, ranks, microbatches)
        except Invalid:
            refused += 1
            continue
        assert check(schedule) == [], (ranks, microbatches)
        assert schedule.name == rule
        assert schedule.size == ranks
    expected = {
        "interleaved": [(p, m) for p, m in SMALL if m >= p and m % (m // p)],
        "dualpipe": [(p, m) for p, m in SMALL if p % 2 or m % 2 or m < 2 * p],
        "dualpipev": [(p, m) for p, m in SMALL if m < 2 * p],
    }
    assert refused == len(expected.get(rule, []))


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_interleaved_is_legal_for_every_group_size(chunks: int) -> None:
    for ranks in range(1, 6):
        for microbatches in range(1, 14):
            for group in range(1, 15):
                last = microbatches % group
                legal = ranks <= group <= microbatches and (last == 0 or last >= ranks)
                if legal:
                    schedule = plan("interleaved", ranks, microbatches, chunks, group)
                    assert check(schedule) == [], (ranks, microbatches, group)
                else:
                    with pytest.raises(Invalid):
                        plan("interleaved", ranks, microbatches, chunks, group)


@pytest.mark.parametrize("chunks", [2, 3])
def test_without_a_group_size_interleaved_is_the_group_size_of_equal_rounds(chunks: int) -> None:
    for ranks, microbatches in ((2, 6), (4, 10), (4, 12), (5, 15), (3, 3)):
        group = microbatches // (microbatches // ranks)
        assert plan("interleaved", ranks, microbatches, chunks) == plan(
            "interleaved", ranks, microbatches, chunks, group
        )


@pytest.mark.parametrize("rule", ["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_weight_gradients_add_up_in_the_order_of_the_microbatches(rule: str) -> None:
    for own in plan(rule, 4, 12).ranks:
        seen: dict[int, int] = {}
        for action in (a for entry in own for a in entry.parts if a.kind in "BW"):
            assert action.microbatch == seen.get(action.stage, -1) + 1
            seen[action.stage] = action.microbatch


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "fragments"),
        [
            (("dualpipe", 3, 12), ("even number of ranks", "3")),
            (("dualpipe", 4, 9), ("microbatches", "9 is odd")),
            (("dualpipe", 4, 6), ("at least 2 * ranks = 8", "6")),
            (("dualpipev", 4, 7), ("at least 2 * ranks = 8", "7")),
            (("interleaved", 4, 9), ("2 equal rounds", "9")),
            (("interleaved", 4, 8, 2, 3), ("group size", "4", "it is 3")),
            (("interleaved", 4, 8, 2, 9), ("group size", "8", "it is 9")),
            (("interleaved", 4, 8, 2, 5), ("last group", "groups of 5 leave 3 of 8")),
            (("interleaved", 4, 8, 0), ("chunks is 0", "above 0")),
            (("gpipe", 0, 8), ("ranks is 0", "above 0")),
            (("gpipe", 4, -1), ("microbatches is -1", "above 0")),
            (("gpipe", 4, 2.0), ("microbatches is 2.0", "whole number")),
            (("gpipe", True, 2), ("ranks is True", "whole number")),
            (("gpipe", 4, 8, 2), ("gpipe has 1 stage", "chunks is 2")),
            (("zbv", 4, 8, 3), ("zbv has 2 stage", "chunks is 3")),
            (("1f1b", 4, 8, None, 4), ("1f1b has no groups", "group is 4")),
            ((["1f1b"], 4, 8), ("['1f1b'] is no schedule", "dualpipev")),
            (("x" * 500, 4, 8), ("xxx is no schedule", "dualpipev")),
            (("zb2p", 4, 8), ("'zb2p'", "gpipe, 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev")),
        ],
    )
    def test_say_which_rule_is_broken(self, arguments: tuple[Any, ...], fragments: tuple[str, ...]) -> None:
        with pytest.raises(Invalid) as caught:
            plan(*arguments)
        one_sentence(caught, *fragments)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("size", [(2, 10**12), (10**12, 2 * 10**12), (10**30, 2 * 10**30)])
    def test_absurd_sizes_are_refused_before_anything_is_made(self, rule: str, size: tuple[int, int]) -> None:
        with pytest.raises(Invalid) as caught:
            plan(rule, *size)
        one_sentence(caught, str(MOST))

    def test_so_is_a_v_that_is_only_large_when_it_is_full(self) -> None:
        with pytest.raises(Invalid) as caught:
            plan("zbv", 2**19, 1)
        one_sentence(caught, str(MOST))

    def test_the_number_of_stages_that_a_rule_has_anyway_may_be_given(self) -> None:
        assert plan("dualpipe", 2, 4, chunks=2) == plan("dualpipe", 2, 4)
