"""Verdicts for people and for programs.  SPEC VERDICT-9."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from refimpl.cases.claims import BITS
from refimpl.cases.format import pretty
from refimpl.validate.tensor import MISSING, OFF, TensorVerdict
from refimpl.validate.verdict import Verdict

COLUMNS = (
    "tensor",
    "verdict",
    "worst at",
    "ours",
    "theirs",
    "absolute",
    "relative",
    "ulps",
    "of bound",
)
HEADERS = (*COLUMNS, "outside", "spread", "bias")


def text(verdict: Verdict) -> str:
    """The table, the first tensor that is off, and what is not judged."""
    if verdict.refused:
        return f"{verdict.case}: not held, an output was written; {verdict.notes[0]}"
    if not verdict.claim:
        return f"{verdict.case}: held, no output was written; {verdict.notes[0]}"
    lines = [f"{verdict.case} as {verdict.claim}: {verdict.title}", ""]
    judged = [t for t in verdict.tensors if t.verdict != MISSING]
    measured = any(t.distance is not None for t in judged)
    if measured:
        lines += [tabulate([_row(t) for t in judged], HEADERS, disable_numparse=True), ""]
    elif verdict.claim == BITS:
        lines += [f"{t.name}: {t.verdict}" for t in judged if not t.note]
    lines += [f"{t.name}: missing, it is required" for t in verdict.tensors if t.bad and t.verdict == MISSING]
    lines += [f"{t.name}: {t.verdict}, {t.note}" for t in verdict.tensors if t.note]
    lines += [_left_out(t) for t in verdict.tensors if t.undecided and t.distance is not None]
    absent = [t.name for t in verdict.tensors if t.verdict == MISSING and not t.bad]
    if absent:
        lines.append(f"probes not given: {_listed(absent)}")
    if verdict.surplus:
        lines.append(f"surplus tensors, not judged: {_listed(list(verdict.surplus))}")
    first = verdict.first_off
    if verdict.arithmetic is not None:
        lines.append(f"Arithmetic: {' or '.join(verdict.arithmetic) or 'none of the listed'}")
    if first is None:
        lines.append("It holds.")
    else:
        lines.append(
            f"It does not hold.  The first tensor that is off, in the order of computation: {first.name}"
        )
        lead = "This case is about: " if verdict.arithmetic is None else ""
        lines += [f"{lead}{note}" for note in verdict.notes]
    return "\n".join(lines)


def to_json(verdict: Verdict, more: Mapping[str, Any] | None = None) -> str:
    """Everything in the verdict, and more if there is more; numbers that JSON has not are text."""
    return pretty(as_dict(verdict) | dict(more or {})) + "\n"


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """The same as plain dictionaries, lists, texts and numbers."""
    first = verdict.first_off
    return {
        "case": verdict.case,
        "claim": verdict.claim,
        "holds": verdict.holds,
        "first_off": None if first is None else first.name,
        "tensors": [_tensor_json(t) for t in verdict.tensors],
        "surplus": list(verdict.surplus),
        "arithmetic": None if verdict.arithmetic is None else list(verdict.arithmetic),
        "notes": list(verdict.notes),
    }


def _row(t: TensorVerdict) -> tuple[str, ...]:
    d = t.distance
    verdict = t.verdict.upper() if t.verdict == OFF else t.verdict
    if d is None:
        return (t.name, verdict, *[""] * 10)
    at = ", ".join(map(str, t.at))
    numbers = (f"{d.ours:.9g}", f"{d.theirs:.9g}", f"{d.absolute:.3g}", f"{d.relative:.3g}", f"{d.ulps:.3g}")
    shares = (
        f"{d.excess:.3g}",
        f"{d.outside:.2%}",
        f"{d.spread:.3g}",
        f"{d.bias:+.2g} ({d.bias_excess:.2g})",
    )
    return (t.name, verdict, at, *numbers, *shares)


def _left_out(t: TensorVerdict) -> str:
    return f"{t.name}: {t.undecided} rows left out, their routing is within the claim's error"


def _tensor_json(t: TensorVerdict) -> dict[str, Any]:
    value: dict[str, Any] = {"name": t.name, "role": t.role, "verdict": t.verdict, "note": t.note}
    value["undecided"] = t.undecided
    if t.distance is not None:
        d = t.distance
        numbers = {name: getattr(d, name) for name in _NUMBERS}
        value |= {"at": list(t.at)} | {name: _number(number) for name, number in numbers.items()}
    return value


_NUMBERS = (
    "ours",
    "theirs",
    "absolute",
    "relative",
    "ulps",
    "excess",
    "outside",
    "spread",
    "bias",
    "bias_excess",
)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
