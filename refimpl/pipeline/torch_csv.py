"""Schedules in PyTorch's CSV form.  SPEC PIPE-42.

torch.distributed.pipelining writes a row for each rank and an action in each cell: stage, kind, microbatch,
as in 0F1 or 3I2; a pair as (0F1;7B0)OVERLAP_F_B; nothing where a rank waits.  Files of its runtime also have
the communication that it derived (2SEND_F0, 1UNSHARD), which a schedule here does not have: it is counted and
left out.  Where two ranks hold one stage (DualPipe), torch reads the cells and refuses the whole.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Final

from refimpl.errors import Invalid, Unreadable
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule

_PLAIN: Final = re.compile(r"([0-9]{1,7})([FBIW])([0-9]{1,7})")
_PAIR: Final = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_DERIVED: Final = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*")


def text(schedule: Schedule) -> str:
    """The file."""
    written = io.StringIO()
    rows = csv.writer(written)  # its line ends are CR LF, as torch's are
    rows.writerows([_cell(entry) for entry in own] for own in schedule.ranks)
    return written.getvalue()


def parse(data: bytes, what: str) -> tuple[Sequence[Sequence[Entry]], int]:
    """(the entries of every rank, how much communication was left out).  Raises Unreadable, Invalid."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{what} has a byte at {error.start} that is not UTF-8, but it must be UTF-8."
        ) from None
    except csv.Error as error:
        raise Unreadable(f"{what} is not CSV ({error}), but it must be a row for each rank.") from None
    while rows and not any(cell.strip() for cell in rows[-1]):  # empty lines at the end are no ranks
        rows.pop()
    ranks: list[list[Entry]] = []
    left_out = 0
    for number, row in enumerate(rows, start=1):
        ranks.append([])
        for column, cell in enumerate(map(str.strip, row), start=1):
            if _DERIVED.fullmatch(cell):
                left_out += 1
            elif cell:
                ranks[-1].append(_entry(cell, f"{what} has {cell[:40]!r} in row {number}, cell {column}"))
    return ranks, left_out


def _cell(entry: Entry) -> str:
    parts = [f"{action.stage}{action.kind}{action.microbatch}" for action in entry.parts]
    return parts[0] if len(parts) == 1 else f"({';'.join(parts)})OVERLAP_F_B"


def _entry(cell: str, found: str) -> Entry:
    pair = _PAIR.fullmatch(cell)
    parts = [_action(part.strip(), found) for part in (pair.groups() if pair else (cell,))]
    if not pair:
        return parts[0]
    parts.sort(key=lambda action: action.kind, reverse=True)
    if [action.kind for action in parts] != ["F", "B"]:
        raise Invalid(f"{found}, but a pair must be an F and a B.")
    return Pair(*parts)


def _action(text: str, found: str) -> Action:
    plain = _PLAIN.fullmatch(text)
    if not plain:
        raise Invalid(f"{found}, but a cell must be as 0F1 (F, B, I or W) or (0F1;7B0)OVERLAP_F_B.")
    return Action(plain[2], int(plain[1]), int(plain[3]))
