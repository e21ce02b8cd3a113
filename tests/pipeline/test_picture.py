"""Pictures of schedules.  SPEC PIPE-44."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import one_sentence

from refimpl.errors import Invalid, Unreadable, Unsupported
from refimpl.pipeline import picture
from refimpl.pipeline.gantt import chart
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action, Pair, Schedule
from refimpl.pipeline.simulate import Durations, Timeline, simulate

UNIT = Durations(1, 1, 1)


def timeline(name: str, ranks: int, microbatches: int, durations: Durations = UNIT) -> Timeline:
    return simulate(plan(name, ranks, microbatches), durations)


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def elements(svg: bytes, kind: str) -> list[Any]:
    return [one for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("}" + kind)]


def test_the_suffix_chooses_the_format(tmp_path: Path, matplotlib: Any) -> None:
    picture.draw([timeline("1f1b", 2, 3)], tmp_path / "a.SVG")
    picture.draw([timeline("1f1b", 2, 3)], tmp_path / "a.png")
    assert elements((tmp_path / "a.SVG").read_bytes(), "svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_bytes_are_the_same_each_time_and_whatever_the_settings(matplotlib: Any) -> None:
    one = [timeline("dualpipe", 4, 8)]
    first = {form: picture.render(one, form) for form in ("svg", "png")}
    with matplotlib.rc_context(
        {"font.size": 20, "savefig.bbox": "tight", "svg.hashsalt": "x", "axes.grid": True}
    ):
        assert {form: picture.render(one, form) for form in ("svg", "png")} == first
    assert b"<dc:date>" not in first["svg"]


def test_drawing_leaves_the_settings_alone(matplotlib: Any) -> None:
    with matplotlib.rc_context({"font.size": 20}):
        picture.render([timeline("1f1b", 2, 3)])
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 10), (8, 20), (16, 64)])
@pytest.mark.parametrize("name", RULES)
def test_all_numbers_are_there_at_the_usual_sizes(
    name: str, ranks: int, microbatches: int, matplotlib: Any
) -> None:
    found = chart(timeline(name, ranks, microbatches))
    scale = picture.Scale.of([found])
    assert picture.SMALLEST <= scale.type <= picture.LARGEST
    fitting = len([cell for cell in found.cells if scale.fits(cell)])
    crowded = ranks * found.shades == 32 and name != "dualpipe"  # 16 ranks, two chunks: a page is too narrow
    assert fitting == len(found.cells) or crowded


@pytest.mark.parametrize("durations", [UNIT, Durations(1, 40, 40)])
def test_a_number_is_drawn_in_each_cell_that_it_fits(durations: Durations, matplotlib: Any) -> None:
    found = timeline("dualpipe", 4, 20, durations)
    groups = [
        g for g in elements(picture.render([found]), "g") if g.get("id", "").startswith("PathCollection")
    ]
    drawn = len([use for group in groups for use in group.iter() if use.tag.endswith("}use")])
    charted = chart(found)
    scale = picture.Scale.of([charted])
    fitting = len([cell for cell in charted.cells if scale.fits(cell)])
    assert drawn == fitting
    assert (fitting == len(charted.cells)) == (durations == UNIT)


def test_a_number_is_left_out_where_it_does_not_fit() -> None:
    found = chart(timeline("1f1b", 2, 40, Durations(1, 400, 400)))
    scale = picture.Scale.of([found])
    fitting = {(cell.kind, scale.fits(cell)) for cell in found.cells}
    assert fitting == {("F", False), ("B", True)}


def test_colours_of_a_pixel_in_each_cell(matplotlib: Any, tmp_path: Path) -> None:
    """One rank, F B twice: where a cell is, its colour is, and idle time is white."""
    image = pytest.importorskip("matplotlib.image")
    schedule = Schedule("x", 1, 2, ((0,), (1,)), ((Action("F", 0, 0), Action("B", 0, 0)),
        (Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0))))  # fmt: skip
    picture.draw([simulate(schedule, Durations(2, 2, 2))], tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")
    unit, dot = picture.NARROWEST / 10, picture.DPI / 72

    def colour(rank: int, time: float) -> str:
        x = (picture.EDGE + picture.LEFT + time * unit) * dot
        y = (picture.EDGE + picture.HEAD + picture.STEP * rank + 3) * dot  # above the number
        red, green, blue = np.rint(255 * pixels[int(y), int(x), :3]).astype(int)
        return f"#{red:02x}{green:02x}{blue:02x}"

    light = {kind: colours[1] for kind, colours in picture.COLOURS.items()}
    assert [colour(0, time) for time in (1, 3, 5, 7)] == [light["F"], "#ffffff", "#ffffff", light["B"]]
    assert [colour(1, time) for time in (1, 3, 5, 7)] == ["#ffffff", light["F"], light["I"], light["W"]]


def test_a_pair_is_two_halves_in_a_black_frame(matplotlib: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    f, b = [Action("F", 0, m) for m in (0, 1)], [Action("B", 0, m) for m in (0, 1)]
    schedule = Schedule("x", 2, 1, ((0,),), ((f[0], Pair(f[1], b[0]), b[1]),))
    picture.draw([simulate(schedule, Durations(2, 1, 1, FB=6))], tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")
    unit, dot = picture.NARROWEST / 10, picture.DPI / 72
    row = pixels[int((picture.EDGE + picture.HEAD + 3) * dot), :, :3]

    def near(time: float) -> float:
        """The darkest of what is within a point of a time: 0 is black."""
        x = (picture.EDGE + picture.LEFT + time * unit) * dot
        return float(row[int(x - dot) : int(x + dot) + 1].max(axis=-1).min())

    assert near(2) < 0.2
    assert near(8) < 0.2
    assert min(near(time) for time in (1, 3, 5, 6, 7, 9)) > 0.7


def test_several_share_one_time_axis(matplotlib: Any) -> None:
    one, other = timeline("1f1b", 3, 5), timeline("zb1p", 3, 5)
    single, both = (ElementTree.fromstring(picture.render(some)) for some in ([one], [one, other]))
    assert single.get("width") == both.get("width")
    assert float(str(both.get("height"))[:-2]) > 1.5 * float(str(single.get("height"))[:-2])


@pytest.mark.parametrize("times", [(1, 1, 1), (10**6, 10**6, 10**6), (76 * 10**10,) * 3])
def test_the_labels_of_the_time_axis_do_not_touch(times: tuple[int, int, int], matplotlib: Any) -> None:
    page = picture._Page([chart(timeline("zb1p", 4, 9, Durations(*times)))])
    labels = [text for text in page.axes.texts if text.get_text().isdecimal()]
    assert len(labels) > 4
    for one, other in pairwise(labels):
        room = other.get_position()[0] - one.get_position()[0]
        assert room > picture._width(other.get_text(), page.small)


def test_a_name_is_text_and_nothing_else(matplotlib: Any) -> None:
    schedule = Schedule("$x^2 <&>", 1, 1, ((0,),), ((Action("F", 0, 0), Action("B", 0, 0)),))
    assert elements(picture.render([simulate(schedule, UNIT)]), "svg")


def test_no_time_at_all_is_drawn_as_well(matplotlib: Any) -> None:
    assert elements(picture.render([timeline("1f1b", 2, 2, Durations(0, 0, 0))]), "svg")


def test_without_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported) as caught:
        picture.draw([timeline("1f1b", 2, 2)], tmp_path / "a.svg")
    one_sentence(caught, "matplotlib", "extra plot")


@pytest.mark.parametrize("name", ["a.gif", "a", "svg", "a.svg.gz"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        picture.draw([timeline("1f1b", 2, 2)], tmp_path / name)
    one_sentence(caught, name, ".svg or .png")


def test_too_many_cells_are_refused(matplotlib: Any) -> None:
    with pytest.raises(Invalid) as caught:
        picture.render([timeline("1f1b", 16, picture.CELLS // 32 + 1)])
    one_sentence(caught, "200032 cells", "1 to 200000")


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, matplotlib: Any) -> None:
    with pytest.raises(Unreadable) as caught:
        picture.draw([timeline("1f1b", 2, 2)], tmp_path / "none" / "a.svg")
    one_sentence(caught, "cannot be written")
