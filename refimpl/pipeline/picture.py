"""Gantt charts of schedules as pictures, like the published figures.  SPEC PIPE-44.

A row for each rank, time to the right.  Everything is laid out in points (1/72 inch), one unit of the axes to
a point, so that what fits into a cell is known before anything is drawn.  Several schedules stand above each
other on one time axis.  Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

import importlib
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from refimpl.checkpoint.atomic import write_bytes
from refimpl.errors import Invalid
from refimpl.pipeline.gantt import Cell, Chart, chart
from refimpl.pipeline.simulate import Timeline
from refimpl.training.picture import available

SUFFIXES: Final = (".svg", ".png")
CELLS: Final = 200_000  # more than this is no picture any more, but a file that nothing opens
DPI: Final = 200

# Kind -> what the legend says, the colours of the lightest and of the darkest shade.  The four stay apart
# for the colour-blind as well.
COLOURS: Final = {
    "F": ("forward", "#ffd685", "#c4640a"),
    "B": ("backward", "#9fd6ac", "#1f7048"),
    "I": ("backward for input", "#a3cdf5", "#2463b5"),
    "W": ("backward for weights", "#f2c4dc", "#a83279"),
}
PAIR: Final = "overlapped forward and backward"
INK, PAPER, GREY, LINE = "#000000", "#ffffff", "#555555", "#cccccc"

LABEL, SMALL, LARGEST, SMALLEST = 7.5, 6.5, 7.0, 3.6  # sizes of type, in points
NARROW: Final = 0.9  # numbers in cells are condensed, as those of a narrow typeface
DIGIT, AROUND = 0.64 * NARROW, 1.6  # a digit's width in sizes of type, and what stays free around a number
ROW, STEP, EDGE = 13.0, 15.0, 8.0
LEFT, HEAD, BETWEEN, AXIS, LEGEND, SWATCH = 52.0, 18.0, 14.0, 28.0, 14.0, 10.0
NARROWEST, WIDEST = 470.0, 1440.0  # of the part that shows time
GROWN, MOST_GROWN = 800.0, 1.6  # what is wider will be shrunk on paper: its labels grow from here on


@dataclass(frozen=True)
class Scale:
    """How many points a unit of time takes, and the size of type in cells."""

    unit: float
    type: float

    @classmethod
    def of(cls, charts: Sequence[Chart]) -> Scale:
        """As wide as makes the numbers of nine cells out of ten fit, between the narrowest and the widest."""
        makespan = max(1, *(one.makespan for one in charts))
        digits = len(str(max((cell.microbatch for one in charts for cell in one.cells), default=0)))
        widths = sorted(
            cell.end - cell.start for one in charts for cell in one.cells if cell.end > cell.start
        )
        usual = widths[len(widths) // 10] if widths else 1.0
        wanted = (DIGIT * digits * LARGEST + AROUND) / usual
        unit = min(max(wanted, NARROWEST / makespan), WIDEST / makespan)
        return cls(unit, min(LARGEST, max(SMALLEST, (unit * usual - AROUND) / (DIGIT * digits))))

    def fits(self, cell: Cell) -> bool:
        number = DIGIT * self.type * len(str(cell.microbatch)) + AROUND
        return (cell.end - cell.start) * self.unit >= number - 1e-9


def check(target: str | PathLike[str]) -> None:
    """Raises Invalid for a suffix that is none of a picture, Unsupported without matplotlib."""
    if str(target) != "-" and Path(target).suffix.lower() not in SUFFIXES:
        raise Invalid(f"{target} is to be a picture, but its name has to end in {' or '.join(SUFFIXES)}.")
    available()


def form(target: str | PathLike[str]) -> str:
    """The format of a file by its name: svg on standard output."""
    return Path(target).suffix.lower()[1:] or "svg"


def draw(timelines: Sequence[Timeline], target: str | PathLike[str]) -> None:
    """Charts above each other, in the format of the target's suffix.

    Raises Invalid, Unreadable, Unsupported.
    """
    check(target)
    write_bytes(target, render(timelines, form(target)))


def render(timelines: Sequence[Timeline], written_as: str = "svg") -> bytes:
    """The bytes of a picture, `svg` or `png`: the same each time with the same matplotlib.  Raises Invalid,
    Unsupported."""
    available()
    charts = [chart(one) for one in timelines]
    cells = len([cell for one in charts for cell in one.cells])
    if not 1 <= cells <= CELLS:
        raise Invalid(f"the picture would have {cells} cells, but it must have 1 to {CELLS}.")
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({"svg.hashsalt": "refimpl", "path.simplify": False})
        figure = _Page(charts).figure
        written = io.BytesIO()
        without = {"Date": None, "Creator": "refimpl"} if written_as == "svg" else {"Software": None}
        figure.savefig(written, format=written_as, dpi=DPI, metadata=without)
    return written.getvalue()


class _Page:
    """A figure with one unit of its axes to a point, filled from the top down; its size is set at the end."""

    def __init__(self, charts: Sequence[Chart]) -> None:
        self.scale = Scale.of(charts)
        self.wide = max(one.makespan for one in charts) * self.scale.unit
        self.grown = min(MOST_GROWN, max(1.0, self.wide / GROWN))  # whatever is no cell
        self.small, self.label = SMALL * self.grown, LABEL * self.grown
        self.top, self.left = EDGE, EDGE + LEFT * self.grown
        heads = [_width(one.title, self.label) * 1.1 + 24 + _width(one.result, self.label) for one in charts]
        self.right = self.left + max(self.wide, NARROWEST, *heads)
        self.figure: Any = importlib.import_module("matplotlib.figure").Figure(facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        for number, one in enumerate(charts):
            self.top += BETWEEN * self.grown if number else 0.0
            self.panel(one)
        self.axis()
        self.legend(charts)
        width, height = self.right + EDGE, self.top + EDGE
        self.figure.set_size_inches(width / 72, height / 72)
        self.axes.set(xlim=(0, width), ylim=(height, 0))

    def panel(self, one: Chart) -> None:
        """Title, rows, and what the shades mean."""
        middle = self.top + 6 * self.grown
        self.text(self.left, middle, one.title, self.label, weight="bold")
        self.text(self.right, middle, one.result, self.label, ha="right")
        self.top += HEAD * self.grown
        unit = self.scale.unit
        self.boxes(
            [(self.left, self.row(r), one.makespan * unit, ROW) for r in range(one.ranks)], "none", LINE, 0.5
        )
        for rank in range(one.ranks):
            self.text(self.left - 5, self.row(rank) + ROW / 2, f"Device {rank}", self.small, ha="right")
        colours: dict[str, list[Cell]] = defaultdict(list)
        inks: dict[tuple[str, str], list[Cell]] = defaultdict(list)
        mixed = {
            (kind, shade): _mixed(light, dark, shade / max(one.shades - 1, 1))
            for kind, (_, light, dark) in COLOURS.items()
            for shade in range(one.shades)
        }
        for cell in one.cells:
            colour = mixed[cell.kind, cell.shade]
            colours[colour].append(cell)
            if self.scale.fits(cell):
                inks[str(cell.microbatch), PAPER if _dark(colour) else INK].append(cell)
        for colour, cells in colours.items():
            boxes = [
                (self.left + c.start * unit, self.row(c.rank), (c.end - c.start) * unit, ROW) for c in cells
            ]
            self.boxes(boxes, colour, PAPER, min(0.6, 0.08 * unit + 0.1))
        frames = [
            (self.left + f.start * unit, self.row(f.rank), (f.end - f.start) * unit, ROW) for f in one.frames
        ]
        self.boxes(frames, "none", INK, min(0.9, 0.05 * unit + 0.35))
        for (number, ink), cells in inks.items():
            middles = [(self.left + (c.start + c.end) / 2 * unit, self.row(c.rank) + ROW / 2) for c in cells]
            self.numbers(number, middles, ink)
        self.top += STEP * one.ranks

    def axis(self) -> None:
        """Time, with round numbers."""
        unit, bottom = self.scale.unit, self.top + 3
        last = round(self.wide / unit)
        apart = max(40 * self.grown, _width(str(last), self.small) + 8)
        step = _round_step(max(1.0, apart / unit))
        middle = bottom + 8.5 * self.grown
        self.line(self.left, bottom, self.left + self.wide, bottom)
        for time in range(0, last + 1, step):
            x = self.left + time * unit
            self.line(x, bottom, x, bottom + 3)
            self.text(x, middle, str(time), self.small, ha="center", color=GREY)
        self.text(self.left - 14 * self.grown, middle, "time", self.small, ha="right", color=GREY)
        self.top += AXIS * self.grown

    def legend(self, charts: Sequence[Chart]) -> None:
        """A swatch for each kind that occurs, all shades side by side; below it what shades mean."""
        shades = max(one.shades for one in charts)
        present = {cell.kind for one in charts for cell in one.cells}
        entries = [
            (name, [_mixed(light, dark, shade / max(shades - 1, 1)) for shade in range(shades)], False)
            for kind, (name, light, dark) in COLOURS.items()
            if kind in present
        ]
        if any(one.frames for one in charts):
            entries.append((PAIR, [COLOURS["F"][1], COLOURS["B"][1]], True))
        x, swatch, line = self.left, SWATCH * self.grown, LEGEND * self.grown
        for name, colours, framed in entries:
            width = swatch * len(colours)
            end = x + width + 0.4 * swatch + _width(name, self.small)
            if x > self.left and end > self.right:
                x, end, self.top = self.left, end - x + self.left, self.top + line
            for number, colour in enumerate(colours):
                self.boxes([(x + swatch * number, self.top, swatch, 0.9 * swatch)], colour, PAPER, 0.3)
            if framed:
                self.boxes([(x, self.top, width, 0.9 * swatch)], "none", INK, 0.9)
            self.text(x + width + 0.4 * swatch, self.top + 0.45 * swatch, name, self.small)
            x = end + 1.4 * swatch
        self.top += line
        for meaning in dict.fromkeys(one.meaning for one in charts if one.meaning):
            names = dict.fromkeys(one.name for one in charts if one.meaning == meaning)
            whose = f"{', '.join(names)}: " if len(charts) > 1 else ""
            self.text(self.left, self.top + 0.45 * swatch, whose + meaning, self.small, color=GREY)
            self.top += line

    def row(self, rank: int) -> float:
        return self.top + STEP * rank

    def boxes(
        self, boxes: Sequence[tuple[float, float, float, float]], face: str, edge: str, wide: float
    ) -> None:
        """Rectangles (x, y, width, height) of one colour, as one path: an SVG stays small."""
        if not boxes:
            return
        path: Any = importlib.import_module("matplotlib.path").Path
        patches: Any = importlib.import_module("matplotlib.patches")
        corners = [
            corner
            for x, y, w, h in boxes
            for corner in ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))
        ]
        codes = [path.MOVETO, path.LINETO, path.LINETO, path.LINETO, path.CLOSEPOLY] * len(boxes)
        self.axes.add_artist(  # not add_patch, which looks for the limits of every rectangle
            patches.PathPatch(
                path(corners, codes), facecolor=face, edgecolor=edge, linewidth=wide, joinstyle="miter"
            )
        )

    def numbers(self, number: str, middles: Sequence[tuple[float, float]], ink: str) -> None:
        """One number at many places, drawn once and used again."""
        textpath: Any = importlib.import_module("matplotlib.textpath").TextPath
        transforms: Any = importlib.import_module("matplotlib.transforms")
        collections: Any = importlib.import_module("matplotlib.collections")
        glyphs = textpath((0, 0), number, size=self.scale.type)
        box = glyphs.get_extents()
        centred = transforms.Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
        centred.scale(NARROW, 1)
        points = transforms.Affine2D().scale(1 / 72) + self.figure.dpi_scale_trans
        self.axes.add_collection(
            collections.PathCollection(
                [centred.transform_path(glyphs)],
                offsets=list(middles),
                offset_transform=self.axes.transData,
                transform=points,
                facecolors=ink,
                linewidths=0,
            ),
            autolim=False,
        )

    def text(self, x: float, y: float, text: str, size: float, **more: Any) -> None:
        """Text, centred on its line."""
        self.axes.text(x, y, text, size=size, va="center_baseline", parse_math=False, **more)

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.axes.plot((x, to_x), (y, to_y), color=GREY, linewidth=0.5, solid_capstyle="butt")


def _width(text: str, size: float) -> float:
    """Of a text, in points."""
    textpath: Any = importlib.import_module("matplotlib.textpath")
    properties = importlib.import_module("matplotlib.font_manager").FontProperties(size=size)
    width, _, _ = textpath.text_to_path.get_text_width_height_descent(text, properties, False)
    return float(width)


def _mixed(light: str, dark: str, depth: float) -> str:
    """The colour at `depth` between two."""
    mixed: Iterable[int] = (
        round(int(light[i : i + 2], 16) * (1 - depth) + int(dark[i : i + 2], 16) * depth) for i in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _dark(colour: str) -> bool:
    """Whether white is the better ink on it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 299 * red + 587 * green + 114 * blue < 500 * 255


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is no less."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10
