"""An output of a port against a case that is compared exactly.  SPEC VERDICT-11, VERDICT-12.

A tensor is given in the type of the case, or as unsigned integers of the same width, which are its codes.
What is judged as numbers (`within`) may have any floating-point type.
For a fingerprint the question is not whether the bits are ours, but whose they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refimpl.cases import exact, fingerprints
from refimpl.cases.folder import FORMAT_OF, Folder, codes_in
from refimpl.cases.format import PROBE, Tensor
from refimpl.cases.staged import is_staged
from refimpl.checkpoint.dtypes import DTYPES
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.numerics.arithmetic import Array
from refimpl.validate import schedules, stagewise
from refimpl.validate.output import FLOATS
from refimpl.validate.tensor import HOLDS, MALFORMED, MISSING, OFF, TensorVerdict


@dataclass(frozen=True)
class Judged:
    """The verdicts on all outputs; names: of a fingerprint, the alternatives that have these bits."""

    tensors: tuple[TensorVerdict, ...]
    surplus: tuple[str, ...]
    notes: tuple[str, ...]
    names: tuple[str, ...] | None


def judge(folder: Folder, given: TensorFile) -> Judged:
    """given: the port's file.  Raises Unreadable."""
    case = folder.case
    expected = schedules.Expected(folder) if case.kind == "schedule" else None
    verdicts: list[TensorVerdict] = []
    usable: dict[str, tuple[Tensor, Array]] = {}
    for t in case.outputs:
        if t.name not in given:
            verdicts.append(TensorVerdict(t.name, t.role, MISSING))
            continue
        if expected is not None:
            verdicts.append(schedules.judge(expected, t, given))
            continue
        fault = _fault(given, t)
        if fault is not None:
            verdicts.append(TensorVerdict(t.name, t.role, MALFORMED, fault))
            continue
        usable[t.name] = t, _read(given, t)
        judged_alone = case.fingerprint is None and not is_staged(case)
        verdicts.append(_tensor(folder, *usable[t.name]) if judged_alone else _plain(t))
    if is_staged(case):
        stages = stagewise.judge(folder, usable)
        verdicts = [stages.get(v.name, v) for v in verdicts]
    verdicts = _without_replaced(verdicts, case.outputs)
    notes = tuple(f"{flag['name']}: {flag['description']} {flag['effect']}" for flag in case.flags)
    names: tuple[str, ...] | None = None
    if case.fingerprint is not None:
        found = fingerprints.identify(case.fingerprint, usable) if usable else None
        names = found.names if found is not None else ()
        if found is not None:
            verdicts = [_named(v, found, v.name in usable) for v in verdicts]
        notes = (*notes, case.fingerprint["note"])
    surplus = tuple(sorted(name for name in given if name not in {t.name for t in case.tensors}))
    return Judged(tuple(verdicts), surplus, notes, names)


def _fault(given: TensorFile, t: Tensor) -> str | None:
    dtype, shape = given.dtype(t.name), given.shape(t.name)
    codes = f"U{8 * DTYPES[t.dtype].codes.itemsize}" if t.dtype in FORMAT_OF else t.dtype
    number = t.within is not None and dtype in FLOATS
    if dtype not in (t.dtype, codes) and not number:
        return f"dtype {dtype} instead of {t.dtype}" + (
            f", or its codes as {codes}" if codes != t.dtype else ""
        )
    if shape != t.shape:
        return f"shape {shape} instead of {t.shape}"
    return None


def _read(given: TensorFile, t: Tensor) -> Array:
    """Codes in the type of the case; numbers in another floating-point type as float64."""
    other = given.dtype(t.name) != t.dtype and given.dtype(t.name) in FLOATS
    return given[t.name].astype(np.float64) if other else codes_in(given, t.name)


def _tensor(folder: Folder, t: Tensor, theirs: Array) -> TensorVerdict:
    ours, positions = folder.judged_codes(t)
    found = exact.compare(t, ours, positions, theirs)
    at = tuple(int(i) for i in np.unravel_index(found.at, t.shape)) if found.at >= 0 else ()
    note = f"{found.text} at {at}" if at else found.text
    return TensorVerdict(t.name, t.role, HOLDS if found.holds else OFF, note, at)


def _plain(t: Tensor) -> TensorVerdict:
    return TensorVerdict(t.name, t.role, HOLDS)


def _named(v: TensorVerdict, found: fingerprints.Found, judged: bool) -> TensorVerdict:
    if not judged:
        return v
    if not found.names:
        return replace(v, verdict=OFF, note=f"none of the listed arithmetics; {found.nearest}")
    named = " or ".join(f"{name} ({text})" for name, text in zip(found.names, found.texts, strict=True))
    if found.allowed:
        return replace(v, note=f"computed as {named}")
    return replace(v, verdict=OFF, note=f"computed as {named}, which the case does not allow")


def _without_replaced(verdicts: list[TensorVerdict], outputs: tuple[Tensor, ...]) -> list[TensorVerdict]:
    """A tensor that is missing is no fault where another is there in its place."""
    there = {v.name for v in verdicts if v.verdict != MISSING}
    spared = {t.instead_of for t in outputs if t.instead_of and t.name in there}
    return [replace(v, role=PROBE) if v.verdict == MISSING and v.name in spared else v for v in verdicts]
