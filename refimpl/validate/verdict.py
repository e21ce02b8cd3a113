"""One output of a port against one case.  SPEC VERDICT-1, VERDICT-9.

Required tensors must be there, in shape, of the right class of dtype, and hold; probes are judged when they
are there.  The tensors are in the order of computation, so the first that is off is where to look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from refimpl.cases.claims import BITS, Claim, claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import Tensor
from refimpl.cases.judging import judge, judge_set
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.errors import Error, Invalid, Unreadable
from refimpl.numerics.arithmetic import Array
from refimpl.validate import bits
from refimpl.validate.tensor import HOLDS, MALFORMED, MISSING, OFF, OPEN, TensorVerdict

FLOATS: Final = frozenset({"F64", "F32", "BF16", "F16"})
INTEGERS: Final = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})


@dataclass(frozen=True)
class Verdict:
    """The verdict on an output file."""

    case: str
    title: str
    claim: str
    tensors: tuple[TensorVerdict, ...]
    surplus: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refused: bool = False  # a reject case whose output is there
    arithmetic: tuple[str, ...] | None = None  # of a fingerprint: the alternatives that have these bits

    @property
    def holds(self) -> bool:
        return not self.refused and not any(t.bad for t in self.tensors)

    @property
    def first_off(self) -> TensorVerdict | None:
        """In the order of computation."""
        return next((t for t in self.tensors if t.bad), None)


def check(case: str | Path, output: str | Path, precision: str | None = None) -> Verdict:
    """The verdict on `output`, under a claimed precision (by default the strictest that the case offers).

    Raises Unreadable when case or output cannot be read, Invalid or Unsupported for a claim that cannot be
    judged.
    """
    folder = Folder.open(case)
    if folder.case.outcome == "reject":
        return _refusal(folder, Path(output))
    if folder.case.kind == "bits":
        return _bits(folder, Path(output), precision)
    claimed = _claim(folder, precision)
    given = safetensors.open_file(output)
    theirs = _Output(folder, given)
    judged = tuple(_tensor(folder, t, theirs, claimed) for t in folder.case.outputs)
    known = {t.name for t in folder.case.tensors}
    surplus = tuple(sorted(name for name in given if name not in known))
    notes = tuple(f"{flag['name']}: {flag['description']} {flag['effect']}" for flag in folder.case.flags)
    return Verdict(folder.case.id, folder.case.title, claimed.name, judged, surplus, notes)


def _refusal(folder: Folder, output: Path) -> Verdict:
    """A reject case holds when the port wrote no output."""
    made = output.exists()
    why = folder.case.reason or ""
    notes = (f"the input is invalid and must be refused: {why}",)
    return Verdict(folder.case.id, folder.case.title, "", (), (), notes, refused=made)


def _bits(folder: Folder, output: Path, precision: str | None) -> Verdict:
    """Cases of kind bits know no precision."""
    if precision not in (None, BITS):
        raise Invalid(
            f"case {folder.case.id} compares bits, but {precision} was claimed; {BITS} is required."
        )
    judged = bits.judge(folder, safetensors.open_file(output))
    case = folder.case
    return Verdict(
        case.id, case.title, BITS, judged.tensors, judged.surplus, judged.notes, False, judged.names
    )


def _claim(folder: Folder, precision: str | None) -> Claim:
    case = folder.case
    claimed = claim(precision or case.claims[0])
    if claimed.name in case.refused:
        raise Invalid(f"case {case.id} is not offered for {claimed.name}: {case.refused[claimed.name]}.")
    if claimed.name not in case.claims and not claimed.name.startswith("u="):
        raise Invalid(
            f"case {case.id} is offered for {', '.join(case.claims)}, but {claimed.name} was claimed."
        )
    return claimed


class _Output:
    """The port's tensors, read one by one and only when their shape and dtype are right."""

    def __init__(self, folder: Folder, given: TensorFile) -> None:
        self._tensors: Mapping[str, Tensor] = {t.name: t for t in folder.case.outputs}
        self._file = given
        self._sets: dict[str, Array | None] = {}

    def fault(self, t: Tensor) -> str | None:
        """What keeps a tensor from being compared."""
        dtype, shape = self._file.dtype(t.name), self._file.shape(t.name)
        wanted = INTEGERS if t.dtype == "I64" else FLOATS
        if dtype not in wanted:
            return f"dtype {dtype} instead of one of {', '.join(sorted(wanted))}"
        if shape != t.shape:
            return f"shape {shape} instead of {t.shape}"
        return None

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def array(self, t: Tensor) -> Array:
        value = self._file[t.name]
        return value.astype(np.int64) if t.dtype == "I64" else value.astype(np.float64)

    def sets(self, name: str) -> Array | None:
        """The port's own sets, when they are there and are sets."""
        if name not in self._sets:
            t = self._tensors[name]
            usable = name in self._file and self.fault(t) is None
            value = self.array(t) if usable else None
            self._sets[name] = None if value is None or _not_sets(t, value) else value
        return self._sets[name]


def _tensor(folder: Folder, t: Tensor, theirs: _Output, claimed: Claim) -> TensorVerdict:
    if t.name not in theirs:
        return TensorVerdict(t.name, t.role, MISSING)
    if claimed.name in t.unjudged:
        return TensorVerdict(t.name, t.role, OPEN, f"{claimed.name} could not tell it from a wrong one")
    fault = theirs.fault(t)
    if fault is not None:
        return TensorVerdict(t.name, t.role, MALFORMED, fault)
    try:
        value = theirs.array(t)
    except Unreadable:
        raise
    except Error as error:
        return TensorVerdict(t.name, t.role, MALFORMED, str(error))
    if t.set:
        return _set(folder, t, value, claimed)
    if t.dtype == "I64":
        return _integers(folder, t, value)
    found = judge(folder, t, value, theirs.sets, claimed)
    if found.distance is None:
        return TensorVerdict(
            t.name, t.role, OPEN, "no row is decided under this claim", undecided=found.undecided
        )
    layout = f"layout {found.layout}" if found.layout else ""
    verdict = HOLDS if found.distance.holds else OFF
    note = "; ".join(part for part in (found.distance.reason, layout) if part)
    at = tuple(int(i) for i in np.unravel_index(found.at, t.shape))
    return TensorVerdict(t.name, t.role, verdict, note, at, found.distance, found.undecided)


def _set(folder: Folder, t: Tensor, value: Array, claimed: Claim) -> TensorVerdict:
    fault = _not_sets(t, value)
    if fault is not None:
        return TensorVerdict(t.name, t.role, MALFORMED, fault)
    found = judge_set(folder, t, value, claimed)
    note = f"{found.rows} rows"
    if found.undecided:
        note += f", {found.undecided} within the claim's error, of which {found.differing} differ"
    if found.holds:
        return TensorVerdict(t.name, t.role, HOLDS, note, undecided=found.undecided)
    ours = folder.judged(t)[0].reshape(-1, t.shape[-1])[found.first]
    own = value.reshape(-1, t.shape[-1])[found.first]
    rows = f"row {found.first} is {sorted(own.tolist())} instead of {sorted(ours.tolist())}"
    detail = f"{found.wrong} of {note} wrong; {rows}"
    return TensorVerdict(t.name, t.role, OFF, detail, (found.first,), undecided=found.undecided)


def _integers(folder: Folder, t: Tensor, value: Array) -> TensorVerdict:
    ours, index = folder.judged(t)
    own = value.reshape(-1) if index is None else value.reshape(-1)[index]
    wrong = np.flatnonzero(ours != own)
    if not wrong.size:
        return TensorVerdict(t.name, t.role, HOLDS)
    flat = int(wrong[0]) if index is None else int(index[wrong[0]])
    at = tuple(int(i) for i in np.unravel_index(flat, t.shape))
    return TensorVerdict(t.name, t.role, OFF, f"{own[wrong[0]]} instead of {ours[wrong[0]]} at {at}", at)


def _not_sets(t: Tensor, value: Array) -> str | None:
    if t.below is not None and value.size and (value.min() < 0 or value.max() >= t.below):
        return f"ids from {value.min()} to {value.max()} instead of 0 to {t.below - 1}"
    ordered = np.sort(value, -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "an id is twice in a row"
    return None
