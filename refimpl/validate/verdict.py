"""One output of a port against one case.  SPEC VERDICT-1, VERDICT-9.

Required tensors must be there, in shape, of the right class of dtype, and hold; probes are judged when they
are there.  The tensors are in the order of computation, so the first that is off is where to look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refimpl.cases.claims import BITS, FP8, Claim, claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import Case, Tensor
from refimpl.cases.judging import Reference, judge, judge_set
from refimpl.cases.staged import is_staged
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.errors import Error, Invalid, Unreadable
from refimpl.numerics.arithmetic import Array
from refimpl.validate import bits
from refimpl.validate.output import Output, not_sets, open_output
from refimpl.validate.tensor import HOLDS, MALFORMED, MISSING, OFF, OPEN, TensorVerdict


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
        return refusal(folder.case, Path(output).exists())
    if folder.case.by_bits:
        offered = (BITS, FP8.name) if is_staged(folder.case) else (BITS,)
        if precision is not None and precision not in offered:
            raise Invalid(
                f"case {folder.case.id} compares bits, but {precision} was claimed; {BITS} is required."
            )
        return of_bits(folder, open_output(folder.case, Path(output)))
    claimed = claim(precision or folder.case.claims[0])
    why = not_offered(folder.case, claimed)
    if why is not None:
        raise Invalid(f"case {why}.")
    return of_numbers(folder, Output(folder.case, open_output(folder.case, Path(output))), claimed)


def of_numbers(reference: Reference, theirs: Output, claimed: Claim) -> Verdict:
    """The verdict on an output under a claim that the case offers.  Raises Unreadable."""
    case = reference.case
    judged = tuple(_tensor(reference, t, theirs, claimed) for t in case.outputs)
    notes = tuple(f"{flag['name']}: {flag['description']} {flag['effect']}" for flag in case.flags)
    return Verdict(case.id, case.title, claimed.name, judged, theirs.surplus, notes)


def of_bits(folder: Folder, given: TensorFile) -> Verdict:
    """The verdict on an output of a case of kind bits.  Raises Unreadable."""
    case, judged = folder.case, bits.judge(folder, given)
    return Verdict(
        case.id, case.title, BITS, judged.tensors, judged.surplus, judged.notes, False, judged.names
    )


def refusal(case: Case, made: bool) -> Verdict:
    """A reject case holds when the port made no output."""
    notes = (f"the input is invalid and must be refused: {case.reason or ''}",)
    return Verdict(case.id, case.title, "", (), (), notes, refused=made)


def not_offered(case: Case, claimed: Claim) -> str | None:
    """Why a case of numbers cannot be judged under a claim; None if it can."""
    if claimed.name in case.refused:
        return f"{case.id} is not offered for {claimed.name}: {case.refused[claimed.name]}"
    if claimed.name not in case.claims and not claimed.name.startswith("u="):
        return f"{case.id} is offered for {', '.join(case.claims)}, but {claimed.name} was claimed"
    return None


def _tensor(reference: Reference, t: Tensor, theirs: Output, claimed: Claim) -> TensorVerdict:
    if t.name not in theirs:
        return TensorVerdict(t.name, t.role, MISSING)
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
        return _set(reference, t, value, claimed)
    if t.dtype == "I64":
        return _integers(reference, t, value)
    broken = _broken(reference, t, value)
    if broken is not None:
        distance = judge(reference, t, value, theirs.sets, claimed).distance
        return replace(broken, distance=None if distance is None or distance.holds else distance)
    if claimed.name in t.unjudged:
        return TensorVerdict(t.name, t.role, OPEN, f"{claimed.name} could not tell it from a wrong one")
    found = judge(reference, t, value, theirs.sets, claimed)
    if found.distance is None:
        return TensorVerdict(
            t.name, t.role, OPEN, "no row is decided under this claim", undecided=found.undecided
        )
    layout = f"layout {found.layout}" if found.layout else ""
    verdict = HOLDS if found.distance.holds else OFF
    note = "; ".join(part for part in (found.distance.reason, layout) if part)
    at = tuple(int(i) for i in np.unravel_index(found.at, t.shape))
    return TensorVerdict(t.name, t.role, verdict, note, at, found.distance, found.undecided)


def _broken(reference: Reference, t: Tensor, value: Array) -> TensorVerdict | None:
    """NaN and infinities, also at positions and in rows that are not judged otherwise; infinities may be
    where scores are masked."""
    wrong = ~np.isfinite(value)
    if not wrong.any():
        return None
    ours = reference.judged(t)[0]
    for masked in np.unique(ours[np.isinf(ours)]):
        wrong &= value != masked
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), t.shape))
    note = f"{np.count_nonzero(wrong)} of {t.size} elements are NaN or infinity"
    return TensorVerdict(t.name, t.role, OFF, note, at)


def _set(reference: Reference, t: Tensor, value: Array, claimed: Claim) -> TensorVerdict:
    fault = not_sets(t, value)
    if fault is not None:
        return TensorVerdict(t.name, t.role, MALFORMED, fault)
    found = judge_set(reference, t, value, claimed)
    note = f"{found.rows} rows"
    if found.undecided:
        note += f", {found.undecided} within the claim's error, of which {found.differing} differ"
    if found.holds:
        return TensorVerdict(t.name, t.role, HOLDS, note, undecided=found.undecided)
    ours = reference.judged(t)[0].reshape(-1, t.shape[-1])[found.first]
    own = value.reshape(-1, t.shape[-1])[found.first]
    rows = f"row {found.first} is {sorted(own.tolist())} instead of {sorted(ours.tolist())}"
    detail = f"{found.wrong} of {note} wrong; {rows}"
    return TensorVerdict(t.name, t.role, OFF, detail, (found.first,), undecided=found.undecided)


def _integers(reference: Reference, t: Tensor, value: Array) -> TensorVerdict:
    ours, index = reference.judged(t)
    own = value.reshape(-1) if index is None else value.reshape(-1)[index]
    wrong = np.flatnonzero(ours != own)
    if not wrong.size:
        return TensorVerdict(t.name, t.role, HOLDS)
    flat = int(wrong[0]) if index is None else int(index[wrong[0]])
    at = tuple(int(i) for i in np.unravel_index(flat, t.shape))
    return TensorVerdict(t.name, t.role, OFF, f"{own[wrong[0]]} instead of {ours[wrong[0]]} at {at}", at)
