"""The inside of an overlapped pair: figure 4 by hand, and what has to hold for any durations."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline.overlap import COMMUNICATION, COMPUTE, Parts, SMs, durations, overlapped
from refimpl.pipeline.rules import plan
from refimpl.pipeline.simulate import simulate

FREE = SMs(10, 0, 0)  # communication that takes no SM
EVEN = Parts(3, 4, 2, 3, 3, 3, 2, 4, 4, 2, 1)
ANY = st.builds(Parts, *[st.integers(0, 20)] * 11)


def test_the_row_of_figure_4_by_hand() -> None:
    pair = overlapped(EVEN, FREE)
    times = {part.name: span for part, *span in zip(pair.parts, pair.start, pair.end, strict=True)}
    assert times == {
        "MLP(B)": [0, 3], "MLP(W)": [3, 6], "MLP(F)": [6, 9],
        "ATTN(B)": [9, 13], "ATTN(W)": [13, 15], "ATTN(F)": [15, 18],
        "DISPATCH(F)": [0, 2], "DISPATCH(B)": [3, 7], "COMBINE(F)": [9, 13],
        "PP": [13, 14], "COMBINE(B)": [14, 16],
    }  # fmt: skip
    assert (pair.makespan, pair.compute, pair.communication, pair.ticks) == (18, 18, 13, 1)
    assert (pair.hidden, pair.exposed) == (13, 0)


def test_communication_that_computing_waits_for_is_exposed() -> None:
    pair = overlapped(Parts(1, 1, 1, 1, 1, 1, 10, 0, 0, 0, 0), FREE)
    assert pair.makespan == 10 + 4  # MLP(B) and MLP(W) beside the dispatch, the other four after it
    assert (pair.hidden, pair.exposed) == (2, 8)


def test_the_lanes_keep_the_order_of_figure_4() -> None:
    pair = overlapped(EVEN, FREE, blocks=2)
    lanes = {
        lane: [part.name for part in pair.parts if part.lane == lane] for lane in (COMPUTE, COMMUNICATION)
    }
    assert lanes[COMPUTE] == ["MLP(B)", "MLP(W)", "MLP(F)", "ATTN(B)", "ATTN(W)", "ATTN(F)"] * 2
    sends = ["DISPATCH(F)", "DISPATCH(B)", "COMBINE(F)"]
    assert lanes[COMMUNICATION] == [*sends, "COMBINE(B)", *sends, "PP", "COMBINE(B)"]


@pytest.mark.parametrize(
    ("sms", "compute", "communication"),
    [
        (SMs(), Fraction(132, 112), 1),
        (SMs(132, 10, 20), Fraction(132, 122), 2),
        (SMs(132, 44, 20), Fraction(132, 88), 1),
        (SMs(132, 0, 0), 1, 1),
    ],
)
def test_sms_scale_both_lanes_exactly(sms: SMs, compute: Fraction, communication: int) -> None:
    assert Fraction(sms.ticks(COMPUTE, 7), sms.unit) == 7 * compute
    assert Fraction(sms.ticks(COMMUNICATION, 7), sms.unit) == 7 * communication


@settings(max_examples=80, deadline=None)
@given(ANY, st.integers(1, 4), st.booleans(), st.integers(1, 60))
def test_a_pair_is_no_shorter_than_a_lane_and_no_longer_than_both(
    parts: Parts, blocks: int, aligned: bool, given_to: int
) -> None:
    pair = overlapped(parts, SMs(communication=given_to), blocks, aligned)
    assert max(pair.compute, pair.communication) <= pair.makespan <= pair.compute + pair.communication
    assert pair.hidden + pair.exposed == pair.communication
    assert pair.makespan >= pair.compute + pair.exposed
    for part, start in zip(pair.parts, pair.start, strict=True):
        assert all(pair.end[need] <= start for need in part.needs)


@settings(max_examples=40, deadline=None)
@given(ANY, st.integers(1, 4))
def test_durations_are_sums_alone_and_the_aligned_pair_together(parts: Parts, blocks: int) -> None:
    times, ticks = durations(parts, blocks=blocks)
    p = parts
    forward = p.attention_forward + p.dispatch_forward + p.mlp_forward + p.combine_forward
    inputs = p.attention_input + p.dispatch_backward + p.mlp_input + p.combine_backward
    assert (ticks * blocks * forward, ticks * blocks * inputs) == (times.F, times.I)
    assert (ticks * blocks * (p.attention_weight + p.mlp_weight), times.I + times.W) == (times.W, times.B)
    pair = overlapped(parts, blocks=blocks, aligned=True)
    assert Fraction(times.FB, ticks) == Fraction(pair.makespan, pair.ticks)
    assert simulate(plan("dualpipe", 2, 4), times).busy == (3 * times.F + 3 * times.B + times.FB,) * 2


@pytest.mark.parametrize("numbers", [(132, 132, 20), (132, 0, 20), (132, -1, 20), (132, 1.5, 20), (0, 0, 0)])
def test_sms_that_cannot_be_given_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(Invalid) as caught:
        SMs(*numbers)
    one_sentence(caught, "SMs")


def test_parts_and_blocks_are_whole_numbers() -> None:
    with pytest.raises(Invalid) as caught:
        Parts(3, 4, 2, 3, -3, 3, 2, 4, 4, 2)
    one_sentence(caught, "mlp_input", "-3")
    with pytest.raises(Invalid) as caught:
        overlapped(EVEN, blocks=0)
    one_sentence(caught, "0 blocks")
