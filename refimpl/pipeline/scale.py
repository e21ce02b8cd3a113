"""How wide time is in a picture of schedules, and which colours its shades have.  SPEC PIPE-44.

A unit of time is as wide as makes the numbers fit into their cells, within what a page takes; their type is
as large as then fits.  Nothing is drawn here, so nothing needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from refimpl.pipeline.gantt import Cell, Chart

LARGEST, SMALLEST = 7.0, 3.6  # sizes of type in cells, in points
NARROW: Final = 0.9  # numbers in cells are condensed, as those of a narrow typeface
DIGIT, AROUND = 0.64 * NARROW, 1.6  # a digit's width in sizes of type, and what stays free around a number
NARROWEST, WIDEST = 470.0, 1440.0  # of the part that shows time


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


def mixed(light: str, dark: str, depth: float) -> str:
    """The colour at `depth` between two."""
    parts = (
        round(int(light[i : i + 2], 16) * (1 - depth) + int(dark[i : i + 2], 16) * depth) for i in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def is_dark(colour: str) -> bool:
    """Whether white is the better ink on it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 299 * red + 587 * green + 114 * blue < 500 * 255


def round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is no less."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10
