"""The sizes and the colours of pictures.  SPEC PIPE-44."""

from __future__ import annotations

import sys

import pytest

from refimpl.pipeline.gantt import chart
from refimpl.pipeline.rules import plan
from refimpl.pipeline.scale import LARGEST, NARROWEST, SMALLEST, WIDEST, Scale, is_dark, mixed, round_step
from refimpl.pipeline.simulate import Durations, simulate


@pytest.mark.parametrize(
    ("least", "step"),
    [(0.5, 1), (1, 1), (1.01, 2), (2.5, 5), (5.1, 10), (11, 20), (50, 50), (51, 100), (1e12 + 1, 2 * 10**12)],
)
def test_steps_of_the_axis_are_round(least: float, step: int) -> None:
    assert round_step(least) == step


def test_a_shade_is_mixed_from_the_lightest_and_the_darkest() -> None:
    light, dark = "#ffd685", "#c4640a"
    assert (mixed(light, dark, 0), mixed(light, dark, 1)) == (light, dark)
    assert mixed("#000000", "#ff8040", 0.5) == "#804020"


def test_ink_is_white_on_dark_colours_alone() -> None:
    colours = ("#000000", "#2463b5", "#a3cdf5", "#ffffff", "#0000ff", "#00ff00")
    assert [is_dark(colour) for colour in colours] == [True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("microbatches", "unit_of", "type_size"), [(8, NARROWEST, LARGEST), (1000, WIDEST, SMALLEST)]
)
def test_a_picture_is_no_narrower_and_no_wider_than_a_page_takes(
    microbatches: int, unit_of: float, type_size: float
) -> None:
    found = chart(simulate(plan("1f1b", 2, microbatches), Durations(1, 1, 1)))
    scale = Scale.of([found])
    assert scale.unit == unit_of / found.makespan
    assert scale.type == type_size


def test_a_scale_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert Scale.of([chart(simulate(plan("zbv", 2, 3), Durations(1, 1, 1)))]).unit > 0
