"""The course of a run as a CSV file: a row for every step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Final

from refimpl.checkpoint.atomic import write_bytes
from refimpl.errors import Invalid, Unreadable
from refimpl.training.stepping import Report

_FIRST: Final = ("step", "tokens", "loss", "main")
_LAST: Final = ("learning_rate", "gradient_norm", "max_violation", "tokens_per_second")


def row(report: Report, tokens: int, seconds: float) -> dict[str, str]:
    """Column -> text.  max_violation is the largest of the layers; load.L.E is the share of layer L's choices
    that fell on expert E, times the experts, so that 1 is even."""
    found = {"step": str(report.step), "tokens": str(tokens), "loss": f"{report.loss:.9g}"}
    found |= {part: f"{value:.9g}" for part, value in report.losses.items()}
    worst = max(report.max_violation.values(), default=0.0)
    values = (report.learning_rate, report.gradient_norm, worst, report.tokens / max(seconds, 1e-9))
    found |= {name: f"{value:.6g}" for name, value in zip(_LAST, values, strict=True)}
    for layer, load in report.loads.items():
        total = max(int(load.sum()), 1)
        found |= {f"load.{layer}.{i}": f"{int(n) * len(load) / total:.4g}" for i, n in enumerate(load)}
    return found


class Curve:
    """An open CSV file; rows are there as soon as they are written."""

    def __init__(self, path: str | PathLike[str], steps: int) -> None:
        """Goes on behind row `steps`; what was written after that is dropped.  Raises Unreadable, Invalid."""
        self._path = Path(path)
        kept = [one for one in read(self._path) if int(one["step"]) <= steps] if steps else []
        self._writer: csv.DictWriter[str] | None = None
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, list(kept[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        write_bytes(self._path, text.getvalue().encode())
        self._file: IO[str] = self._path.open("a", encoding="utf-8", newline="")
        if kept:
            self._writer = csv.DictWriter(self._file, list(kept[0]), lineterminator="\n")

    def add(self, values: Mapping[str, str]) -> None:
        """One row more.  Raises Invalid if the file is another run's."""
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(values), lineterminator="\n")
            self._writer.writeheader()
        if set(self._writer.fieldnames) != set(values):
            raise Invalid(f"{self._path} has the columns of another run, but it must be this run's curve.")
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: str | PathLike[str]) -> list[dict[str, str]]:
    """All complete rows of a curve, none where there is no file.  Raises Unreadable, Invalid."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} cannot be read ({error}), but it must be a CSV file.") from None
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # the writer was killed in the middle of it
        lines.pop()
    rows = list(csv.DictReader(lines))
    for one in rows:
        if None in one or not all(one.values()) or not one.get("step", "").isdecimal():
            raise Invalid(f"{path} has the row {str(one)[:60]}, but a curve must have a step in each.")
    return rows
