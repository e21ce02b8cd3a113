"""Which alternative of a choice a port takes, from its numbers.  SPEC VERDICT-13.

A case that does not hold is computed again under each other alternative of every choice that it reads; one
under which the port's output holds explains it.  A case that holds, and under whose tolerances an
alternative's own values would not, refutes that alternative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from refimpl.cases.claims import CLAIMS, Claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import Tensor
from refimpl.cases.judging import Reference, judge, judge_set
from refimpl.config.choices import CHOICES, PROFILES, Choices
from refimpl.errors import Error
from refimpl.numerics.arithmetic import Array
from refimpl.programs import Outputs, Setting
from refimpl.validate import recomputed
from refimpl.validate.output import Output
from refimpl.validate.tensor import HOLDS, MALFORMED, MISSING, OFF
from refimpl.validate.verdict import Verdict, of_numbers

SAME: Final = 1e-12  # relative; what is nearer than this is the same value, computed in another order
NEARER: Final = 0.9  # of an error: an alternative that does not make it smaller is not tried further
FAR: Final = 8.0  # times the spread that the case allows: further off is another value
Alternatives = Mapping[str, Any]  # choice -> alternative
_NAMES: Final = frozenset(choice.name for choice in CHOICES)


@dataclass(frozen=True)
class Explanation:
    """Alternatives under which an output holds that does not hold under the case's own.  claims: whether it
    holds so under each claim that the case offers."""

    changes: Alternatives
    verdict: Verdict
    claims: Mapping[str, bool]


class _Watched(Choices):
    """Choices that note which of them are asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in _NAMES:
            seen = object.__getattribute__(self, "__dict__").get("seen")
            if seen is not None:
                seen.add(name)
        return object.__getattribute__(self, name)


class Trial:
    """A case computed under its own choices (with those that the port declares), and under others."""

    def __init__(self, folder: Folder, declared: Alternatives) -> None:
        """Raises Error if the case cannot be computed again."""
        self.folder = folder
        watched: list[set[str]] = []

        def watch(setting: Setting) -> Setting:
            choices = _Watched(**setting.choices.replace(**declared).to_dict())
            watched.append(set())
            object.__setattr__(choices, "seen", watched[0])
            return replace(setting, choices=choices)

        setting, self.outputs = recomputed.float64(folder, watch)
        self.reads = tuple(choice.name for choice in CHOICES if choice.name in watched[0])
        self.setting = replace(setting, choices=Choices(**setting.choices.to_dict()))

    def under(self, changes: Alternatives) -> tuple[Setting, Outputs] | None:
        """None where the alternatives are impossible here, or change nothing."""
        try:
            setting = replace(self.setting, choices=self.setting.choices.replace(**changes))
            outputs = recomputed.values(self.folder.case, setting)
        except Error:
            return None
        names = [t.name for t in self.folder.case.outputs]
        changed = any(_differ(self.outputs[name], outputs[name]) for name in names)
        return (setting, outputs) if changed else None

    def singles(self, declared: Alternatives) -> list[Alternatives]:
        """Every other alternative of every choice that the case reads and the port does not declare."""
        found: list[Alternatives] = []
        for choice in CHOICES:
            if choice.name not in self.reads or choice.name in declared:
                continue
            own = getattr(self.setting.choices, choice.name)
            found += [{choice.name: a} for a in choice.alternatives if a not in (own, "null")]
        return found

    def combined(self, known: Alternatives, declared: Alternatives) -> list[Alternatives]:
        """What was found elsewhere, alone and with every single alternative, and whole profiles."""
        common = {name: value for name, value in known.items() if name in self.reads}
        found: list[Alternatives] = [{**common, **one} for one in self.singles(declared)] if common else []
        for profile in PROFILES.values():
            differing = self.setting.choices.differing(profile)
            names = [n for n in differing if n in self.reads and n not in declared and n != "max_seq_len"]
            found.append({name: getattr(profile, name) for name in names})
        return [common, *found] if common else found


def declared_reference(folder: Folder, declared: Alternatives) -> Reference | None:
    """The case under the choices that a port declares; None if they change nothing.  Raises Error if it
    cannot be computed again."""
    own = Choices.from_dict(folder.case.choices)
    if own == own.replace(**declared):
        return None
    setting, outputs = recomputed.float64(folder)
    chosen = replace(setting, choices=setting.choices.replace(**declared))
    others = recomputed.values(folder.case, chosen)
    if not any(_differ(outputs[t.name], others[t.name]) for t in folder.case.outputs):
        return None
    return recomputed.rederived(folder, chosen, others)


def explain(
    trial: Trial,
    candidates: Iterable[Alternatives],
    reference: Reference,
    verdict: Verdict,
    theirs: Output,
    claim: Claim,
    *,
    first: bool = False,
) -> list[Explanation]:
    """The candidates under which the output holds, or only the first of them.  verdict: that against
    `reference`, which is off."""
    if any(t.bad and t.verdict in (MISSING, MALFORMED) for t in verdict.tensors):
        return []
    found: list[Explanation] = []
    for changes in candidates:
        other = trial.under(changes)
        if other is None or not _plausible(reference, other[1], verdict, theirs, claim):
            continue
        alternative = recomputed.rederived(trial.folder, *other)
        judged = of_numbers(alternative, theirs, claim)
        if judged.holds:
            found.append(Explanation(changes, judged, by_claim(alternative, theirs, judged)))
            if first:
                break
    return found


def by_claim(reference: Reference, theirs: Output, verdict: Verdict) -> dict[str, bool]:
    """Whether an output holds under each claim that the case offers, and the one that was judged."""
    found = {verdict.claim: verdict.holds}
    for name in reference.case.claims:
        if name not in found:
            found[name] = of_numbers(reference, theirs, CLAIMS[name]).holds
    return found


def refuted(
    trial: Trial, declared: Alternatives, reference: Reference, verdict: Verdict, claim: Claim
) -> dict[str, tuple[Any, ...]]:
    """choice -> its alternatives that would not hold here, judged by what the port gave, which holds."""
    given = {t.name for t in verdict.tensors if t.verdict != MISSING}
    found: dict[str, tuple[Any, ...]] = {}
    for single in trial.singles(declared):
        other = trial.under(single)
        if other is None:
            continue
        if any(_off(reference, t, other[1], claim) for t in reference.case.outputs if t.name in given):
            ((name, value),) = single.items()
            found[name] = (*found.get(name, ()), value)
    return found


def _plausible(reference: Reference, other: Outputs, verdict: Verdict, theirs: Output, claim: Claim) -> bool:
    """A quick look, with the case's own noise: whether no tensor is far from the other values, and the first
    one that is off is nearer to them."""
    against = recomputed.Recomputed(reference, other)
    first = next(v for v in verdict.tensors if v.verdict == OFF)
    for v in verdict.tensors:
        t = reference.case.tensor(v.name)
        if v.verdict not in (OFF, HOLDS) or (v.distance is None and v is not first):
            continue
        value = theirs.array(t)
        if t.set or t.dtype == "I64":
            if _wrong_rows(against, t, value) >= _wrong_rows(reference, t, value):
                return False
            continue
        after = judge(against, t, value, theirs.sets, claim).distance
        if after is None:
            continue
        if math.isfinite(after.spread) and after.spread > FAR * _growth(reference, against, t):
            return False
        before = v.distance if v is first else None
        if before is None:
            continue
        if after.spread >= NEARER * before.spread and after.excess >= NEARER * before.excess:
            return False
    return True


def _wrong_rows(reference: Reference, t: Tensor, value: Array) -> int:
    ours = np.sort(reference.judged(t)[0].reshape(-1, t.shape[-1]), -1)
    return int(np.count_nonzero((ours != np.sort(value.reshape(-1, t.shape[-1]), -1)).any(-1)))


def _growth(reference: Reference, against: Reference, t: Tensor) -> float:
    """How much larger the other values are, at least 1: their noise grows with them."""
    largest = []
    for r in (reference, against):
        ours = r.judged(t)[0]
        largest.append(float(np.abs(ours[np.isfinite(ours)]).max(initial=0.0)))
    return max(1.0, largest[1] / largest[0]) if largest[0] else math.inf


def _off(reference: Reference, t: Tensor, other: Outputs, claim: Claim) -> bool:
    """Whether other values of a tensor, taken as an output, do not hold."""
    if claim.name in t.unjudged:
        return False
    value = np.asarray(other[t.name]).reshape(t.shape)
    if t.set:
        return not judge_set(reference, t, value, claim).holds
    if t.dtype == "I64":
        return bool((reference.judged(t)[0] != _kept(reference, t, value)).any())

    def sets(name: str) -> Array | None:
        return np.asarray(other[name]).reshape(reference.case.tensor(name).shape) if name in other else None

    found = judge(reference, t, value, sets, claim)
    return found.distance is not None and not found.distance.holds


def _kept(reference: Reference, t: Tensor, value: Array) -> Array:
    index = reference.judged(t)[1]
    flat = value.reshape(-1)
    return flat if index is None else flat[index]


def _differ(a: Any, b: Any) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        return True
    if x.dtype.kind in "iu":
        return bool((x != y).any())
    finite = np.isfinite(x) & np.isfinite(y)
    if (x[~finite] != y[~finite]).any():
        return True
    x, y = x[finite], y[finite]
    return bool(np.abs(x - y).max(initial=0.0) > SAME * np.abs(x).max(initial=0.0))
