"""Judging one output of a case: which elements count, and what a claim allows them.  SPEC VERDICT-3 to
VERDICT-8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refimpl.cases.claims import PARTS, Claim
from refimpl.cases.folder import sample_positions
from refimpl.cases.format import UNCAPPED, Case, Tensor
from refimpl.cases.judge import BIAS, Distance, Tolerance, measure, spread_factor
from refimpl.numerics.arithmetic import Array

Parts = tuple[float, float, float]


class Reference(Protocol):
    """What a case expects: a folder, or a case in memory."""

    @property
    def case(self) -> Case: ...
    def judged(self, t: Tensor) -> tuple[Array, Array | None]: ...
    def extra(self, t: Tensor, kind: str) -> Array | None: ...


@dataclass(frozen=True)
class InMemory:
    """A case that was just built, with large outputs as their samples, as they are committed."""

    case: Case
    expected: Mapping[str, Array]
    extras: Mapping[str, Array]

    def judged(self, t: Tensor) -> tuple[Array, Array | None]:
        flat = self.expected[t.name].reshape(-1)
        if t.samples is None:
            return flat, None
        index = sample_positions(t.name, t.size)
        return flat[index], index

    def extra(self, t: Tensor, kind: str) -> Array | None:
        if kind not in t.extras:
            return None
        array = self.extras[f"{kind}/{t.name}"]
        if t.samples is not None and array.shape == t.shape:
            return array.reshape(-1)[sample_positions(t.name, t.size)]
        return array


@dataclass(frozen=True)
class Judged:
    """The verdict on a tensor of numbers.  `at` is a flat position in the whole tensor."""

    distance: Distance | None  # None when no element could be judged
    at: int
    layout: str  # "" or the permitted permutation that was undone
    undecided: int  # rows left out


@dataclass(frozen=True)
class JudgedSet:
    """The verdict on a tensor of sets.  wrong counts rows that differ although the margin forbids it."""

    rows: int
    wrong: int
    undecided: int  # rows that the margin leaves open
    differing: int  # of those, rows that differ
    first: int  # first wrong row, or -1

    @property
    def holds(self) -> bool:
        return self.wrong == 0


def combined(parts: Parts, claim: Claim) -> float:
    """Independent contributions of the three roundoffs, per unit of each."""
    return float(np.sqrt(sum((u * p) ** 2 for u, p in zip(claim.roundoffs, parts, strict=True))))


def tolerance(
    reference: Reference, t: Tensor, claim: Claim, ours: Array, index: Array | None
) -> Tolerance | None:
    """What the claim allows the judged elements, which are `ours`; None when they have to be equal."""
    count = ours.size
    if reference.case.tolerance is None or reference.case.tolerance["derivation"] == "exact":
        return None
    underflow = 2.0 ** (claim.lowest - claim.bits)  # one rounding below the smallest normal value
    element = np.full(count, 8.0 * underflow)
    for u, part in zip(claim.roundoffs, PARTS, strict=True):
        own = reference.extra(t, f"bound.{part}")
        if own is not None:
            element = element + u * _of_elements(own, t, index)
    spread = float(np.hypot(combined(t.spread, claim) if t.spread else 0.0, underflow))
    bias = combined(t.bias, claim) if t.bias else 0.0
    size = float(np.linalg.norm(ours[np.isfinite(ours)]))
    independent = spread / size if size else 0.0  # what errors of that spread give when they are independent
    allowed = BIAS * max(bias, independent) + 4.0 * claim.accumulate  # and constants that are rounded once
    cap = t.cap.get(claim.name, UNCAPPED)
    return Tolerance(cap[0] * element, cap[1] * spread_factor(count) * spread, cap[2] * allowed)


def _of_elements(part: Array, t: Tensor, index: Array | None) -> Array:
    """A bound per row or per element, for the judged elements, flat."""
    if part.shape == (*t.shape[:-1], 1):
        part = np.broadcast_to(part, t.shape).reshape(-1)
        return part if index is None else part[index]
    return part.reshape(-1)


def decided(reference: Reference, t: Tensor, claim: Claim) -> Array:
    """Rows (T,) of a set whose members the claim's errors cannot change: each of two may move by the
    doubt."""
    margin = reference.extra(t, "margin")
    if margin is None:
        return np.ones(int(np.prod(t.shape[:-1])), bool)
    doubt = np.zeros(margin.shape)
    for u, part in zip(claim.roundoffs, PARTS, strict=True):
        own = reference.extra(t, f"doubt.{part}")
        doubt = doubt if own is None else doubt + u * own
    return np.asarray(margin > 2.0 * doubt)


def judge_set(reference: Reference, t: Tensor, theirs: Array, claim: Claim) -> JudgedSet:
    """theirs of the tensor's shape, integers, each row in any order."""
    ours, _ = reference.judged(t)
    wide = t.shape[-1]
    same = np.all(np.sort(ours.reshape(-1, wide), -1) == np.sort(theirs.reshape(-1, wide), -1), -1)
    sure = decided(reference, t, claim)
    wrong = ~same & sure
    first = int(np.argmax(wrong)) if wrong.any() else -1
    return JudgedSet(len(same), int(wrong.sum()), int((~sure).sum()), int((~same & ~sure).sum()), first)


def judge(
    reference: Reference, t: Tensor, theirs: Array, others: Callable[[str], Array | None], claim: Claim
) -> Judged:
    """theirs of the tensor's shape, float64.  others: name -> the port's own sets."""
    ours, index = reference.judged(t)
    keep, undecided = _counted(reference, t, others, claim, index)
    if t.ordered_by:
        theirs = _in_our_order(reference, t, theirs, others(t.ordered_by))
    positions = np.arange(t.size) if index is None else index
    every = ours
    positions, ours = positions[keep], ours[keep]
    if not ours.size:
        return Judged(None, -1, "", undecided)
    allowed = tolerance(reference, t, claim, every, index)
    if allowed is not None:
        allowed = Tolerance(allowed.element[keep], allowed.spread, allowed.bias)
    best: Judged | None = None
    for layout, array in _layouts(t, theirs):
        own = array.reshape(-1)[positions]
        distance = measure(ours if allowed else _demanded(ours, own, claim), own, allowed, claim)
        found = Judged(distance, int(positions[distance.at]), layout, undecided)
        if distance.holds:
            return found
        best = (
            found if best is None or best.distance is None or distance.excess < best.distance.excess else best
        )
    assert best is not None
    return best


def _demanded(ours: Array, theirs: Array, claim: Claim) -> Array:
    """Exact values: stored in the claim's format, or in one that loses nothing."""
    return np.where(theirs == ours, ours, _stored(ours, claim))


def _stored(ours: Array, claim: Claim) -> Array:
    """Exact values as the claim's storage format holds them: one rounding, to nearest even."""
    step = claim.ulp(ours)
    return np.asarray(np.rint(ours / step) * step)


def _counted(
    reference: Reference, t: Tensor, others: Callable[[str], Array | None], claim: Claim, index: Array | None
) -> tuple[Array, int]:
    """(mask over the judged elements, how many rows are left out)."""
    count = t.size if index is None else index.size
    if not t.decided_by:
        return np.ones(count, bool), 0
    rows: Array | None = None
    for name in t.decided_by:
        source = reference.case.tensor(name)
        own = decided(reference, source, claim)
        theirs = others(name)
        if theirs is not None:
            wide = source.shape[-1]
            expected = np.sort(reference.judged(source)[0].reshape(-1, wide), -1)
            own = np.all(expected == np.sort(theirs.reshape(-1, wide), -1), -1)
        rows = own if rows is None else rows & own
    assert rows is not None
    of = (np.arange(t.size) if index is None else index) // (t.size // len(rows))
    return rows[of], int((~rows).sum())


def _in_our_order(reference: Reference, t: Tensor, theirs: Array, ids: Array | None) -> Array:
    """Their weights at our experts; without their ids the order has to be ours."""
    assert t.ordered_by is not None
    if ids is None:
        return theirs
    source = reference.case.tensor(t.ordered_by)
    ours = reference.judged(source)[0].reshape(-1, source.shape[-1])
    match = ours[:, :, None] == ids.reshape(ours.shape)[:, None, :]  # (T, K ours, K theirs)
    column = np.argmax(match, -1)
    picked = np.take_along_axis(theirs.reshape(ours.shape), column, -1)
    return np.where(match.any(-1), picked, np.nan).reshape(theirs.shape)


def _layouts(t: Tensor, theirs: Array) -> list[tuple[str, Array]]:
    """Their values as ours would be, for every permitted layout, the plain one first."""
    found = [("", theirs)]
    wide = t.shape[-1]
    if "halves" in t.layouts:  # their first components come first, ours alternate
        order = np.arange(wide).reshape(2, wide // 2).T.reshape(-1)
        found.append(("halves", theirs[..., order]))
    return found
