"""No tolerance is larger than eight times the error of the zoo.  SPEC ZOO-3.

A derived tolerance covers what any correct implementation could lose; correct implementations lose less,
often much less.  So the case is computed by a few members of the zoo for each claim, those of `CAP`, with the
exact routing.  For each of the three tests the zoo's error is the largest error over tolerance of any of
them, times 1 + 4 / sqrt(members * rows), because few numbers may be small by chance, and at least that of
storing exact results once, as every port does:

    element     u |y|
    spread      u rms(y) / sqrt(3)
    bias        u / sqrt(3) of the elements' independent errors, joined

The cap is the factor by which the tolerance shrinks: eight times the zoo's error, or 1.  Bias keeps the four
accumulate roundoffs of constants, which members of the zoo share.  Where no member is off at all, which is
luck (a gradient that cancels to zero), there is no cap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from refimpl.cases.claims import Claim
from refimpl.cases.format import UNCAPPED, Case, Tensor
from refimpl.cases.judge import Tolerance, measure
from refimpl.cases.judging import InMemory, tolerance
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.contraction import sum_
from refimpl.programs import Outputs, Setting
from refimpl.variants.zoo import ZOO

Three = tuple[float, float, float]
TIMES: Final = 8.0
# claim -> members: the longest chains of roundings, the forms that store most often, and the two forms of
# attention whose errors are of another kind: a sum from the output, and a query that is scaled first.
CAP: Final[Mapping[str, tuple[str, ...]]] = {
    "fp32": ("one by one", "reversed", "lanes", "constants in float32", "flash", "fused AdamW"),
    "tf32": (
        "tf32",
        "tf32 cut",
        "tf32 one by one",
        "tf32 flash",
        "tf32 scaled query",
        "constants in float32",
        "fused AdamW",
    ),
    "fp16": ("fp16 eager", "fp16 fused", "fp16 operands", "fp16 scaled query"),
    "bf16": ("bf16 eager", "bf16 demo", "bf16 one by one", "bf16 fused", "bf16 scaled query"),
}
_MEMBERS = {member.name: member for member in ZOO}


def capped(reference: InMemory, setting: Setting, claims: Iterable[Claim]) -> Case:
    """The case with the caps of its tensors.  setting: the case with its exact routing given."""
    case = reference.case
    caps: dict[str, dict[str, Three]] = {}
    for claim in claims:
        if claim.name not in CAP:
            continue
        members = [_MEMBERS[name] for name in CAP[claim.name]]
        runs = [m.outputs(case.component, setting) for m in members if m.runs(case.component)]
        for t in case.outputs:
            if t.set or t.dtype != "F64":
                continue
            own = _cap(reference, t, claim, [outputs for outputs in runs if t.name in outputs])
            if own != UNCAPPED:
                caps.setdefault(t.name, {})[claim.name] = own
    return replace(case, tensors=tuple(replace(t, cap=caps.get(t.name, {})) for t in case.tensors))


def _cap(reference: InMemory, t: Tensor, claim: Claim, runs: list[Outputs]) -> Three:
    """Of the judged elements: all of them in a whole case, the samples in a committed one."""
    views = [t] if t.samples is None else [t, replace(t, samples=None)]
    found = [_cap_of(reference, view, claim, runs) for view in views]
    return max(own[0] for own in found), max(own[1] for own in found), max(own[2] for own in found)


def _cap_of(reference: InMemory, t: Tensor, claim: Claim, runs: list[Outputs]) -> Three:
    ours, index = reference.judged(t)
    allowed = tolerance(reference, t, claim, ours, index)
    if allowed is None or not runs:
        return UNCAPPED
    largest = [0.0, 0.0, 0.0]
    for outputs in runs:
        theirs = np.asarray(outputs[t.name], np.float64).reshape(-1)
        distance = measure(ours, theirs if index is None else theirs[index], allowed, claim)
        for i, found in enumerate((distance.excess, distance.spread, distance.bias_excess)):
            largest[i] = max(largest[i], found)
    if not all(largest):
        return UNCAPPED
    few = _few(len(runs) * (t.size // t.shape[-1] if len(t.shape) > 1 else t.size))
    once = _stored_once(ours, allowed, claim)
    constants = _over(4.0 * claim.accumulate, allowed.bias)
    return (
        _factor(max(few * largest[0], once[0])),
        _factor(max(few * largest[1], once[1])),
        _factor(max(_few(len(runs)) * largest[2], once[2]), constants),
    )


def _few(numbers: int) -> float:
    return 1.0 + 4.0 / math.sqrt(numbers)


def _stored_once(ours: Array, allowed: Tolerance, claim: Claim) -> Three:
    """The error of exact results after one rounding, over what is allowed."""
    finite = np.where(np.isfinite(ours), np.abs(ours), 0.0)
    scale = float(finite.max(initial=0.0)) or 1.0  # so that powers neither overflow nor vanish
    underflow, y = 2.0 ** (claim.lowest - claim.bits), finite / scale
    element = float(np.max((claim.storage * finite + underflow) / allowed.element))
    squares, fourth = float(sum_(y * y)), float(sum_(y * y * (y * y)))
    rounding = claim.storage * scale * math.sqrt(squares / y.size / 3.0)
    spread = math.sqrt(rounding * rounding + underflow * underflow)
    bias = claim.storage * math.sqrt(fourth / 3.0) / squares if squares else 0.0
    return element, _over(spread, allowed.spread), _over(bias, allowed.bias)


def _over(value: float, allowed: float) -> float:
    return 0.0 if value == 0.0 else math.inf if allowed == 0.0 else value / allowed


def _factor(zoo: float, kept: float = 0.0) -> float:
    """Rounded up to two digits, from a little below, so that the last bits of sums do not matter."""
    value = (TIMES * zoo + kept) * (1.0 - 2.0**-30)
    if not value < 1.0:
        return 1.0
    nearest = f"{value:.1e}"
    if float(nearest) >= value:
        return float(nearest)
    step = float(f"1e{int(nearest.split('e')[1]) - 1}")
    return min(1.0, float(f"{float(nearest) + step:.1e}"))
