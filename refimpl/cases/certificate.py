"""The proof that a case can fail.  SPEC CASE-10.

For every claim and every required tensor, the verdict is given outputs that are wrong on purpose:

    zeros     nothing was computed
    negated   a sign is wrong
    scaled    0.9 of the right values
    rows      the right values, each row in the place of another one

A gradient that would pass under a claim is not judged under it, and case.json lists it (`unjudged`).  When
it is a result, or more than half of the required tensors, the case does not offer the claim, and case.json
says why. A wrong output that is the right one (the rows of a constant, a tensor of zeros) is named as not
applicable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.cases.claims import CLAIMS, PARTS, Claim
from refimpl.cases.format import REQUIRED, Case, Tensor
from refimpl.cases.judge import worst_excess
from refimpl.cases.judging import InMemory, decided, judge, judge_set, tolerance
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array

WRONG: Mapping[str, Callable[[Array], Array]] = {
    "zeros": np.zeros_like,
    "negated": lambda x: -x,
    "scaled": lambda x: 0.9 * x,
    "rows": lambda x: np.roll(x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x, 1, 0).reshape(x.shape),
}
ENDLESS = "exact"  # written instead of an infinite factor: nothing but the right bits passes


def certified(
    case: Case, expected: Mapping[str, Array], extras: Mapping[str, Array], offered: Mapping[str, str | None]
) -> Case:
    """The case with its claims and certificate.  offered: claim -> why it is not offered, or None.

    Raises Invalid if no claim is left.
    """
    reference = InMemory(case, expected, extras)
    refused = {name: why for name, why in offered.items() if why is not None}
    unfit: dict[str, dict[str, str]] = {}
    unjudged: dict[str, list[str]] = {}  # tensor -> claims
    rejects: dict[str, dict[str, Any]] = {}
    required = [t for t in case.outputs if t.role == REQUIRED]
    for name in (name for name, why in offered.items() if why is None):
        factors = {t.name: _factors(reference, t, CLAIMS[name], unfit) for t in required}
        blind = [tensor for tensor, own in factors.items() if own and min(own.values()) <= 1.0]
        essential = [tensor for tensor in blind if not tensor.startswith("grad.")]
        if essential or 2 * len(blind) > len(required):
            wrong = min(factors[blind[0]], key=lambda w: factors[blind[0]][w])
            refused[name] = f"the verdict would accept {blind[0]} when it is wrong: {wrong}"
            continue
        for tensor in blind:
            unjudged.setdefault(tensor, []).append(name)
        seen = [own for tensor, own in factors.items() if tensor not in blind]
        rejects[name] = {
            w: _round(min(own[w] for own in seen if w in own)) for w in WRONG if any(w in own for own in seen)
        }
    if not rejects:
        raise Invalid(f"case {case.id} is offered for no claim: {refused}.")
    tensors = tuple(
        _with_largest(reference, replace(t, unjudged=tuple(unjudged.get(t.name, ()))), tuple(rejects))
        for t in case.tensors
    )
    return replace(
        case,
        claims=tuple(rejects),
        refused=refused,
        tensors=tensors,
        certificate={"rejects": rejects, "not_applicable": unfit},
    )


def _factors(
    reference: InMemory, t: Tensor, claim: Claim, unfit: dict[str, dict[str, str]]
) -> dict[str, float]:
    """wrong output -> by what factor the verdict misses it."""
    found: dict[str, float] = {}
    right = reference.expected[t.name]
    for name, spoil in WRONG.items():
        wrong = spoil(right) if not t.set else _spoiled_set(name, right, t)
        if wrong is None or np.array_equal(_comparable(t, wrong), _comparable(t, right)):
            unfit.setdefault(t.name, {})[name] = "gives the right values"
        else:
            found[name] = _factor(reference, t, wrong, claim)
    return found


def _factor(reference: InMemory, t: Tensor, wrong: Array, claim: Claim) -> float:
    if t.set:
        sure = decided(reference, t, claim)
        if not sure.any():
            return 0.0
        return 0.0 if judge_set(reference, t, wrong, claim).holds else np.inf
    found = judge(reference, t, wrong, lambda name: reference.expected.get(name), claim)
    return 0.0 if found.distance is None else worst_excess(found.distance)


def _spoiled_set(name: str, right: Array, t: Tensor) -> Array | None:
    """Sets have no sign and no scale: zeros are the first experts, rows are other tokens' experts."""
    if name == "zeros":
        return np.broadcast_to(np.arange(t.shape[-1]), t.shape)
    return WRONG["rows"](right) if name == "rows" else None


def _comparable(t: Tensor, x: Array) -> Array:
    return np.sort(x, -1) if t.set else x


def _round(value: float) -> float | str:
    return ENDLESS if not np.isfinite(value) else float(f"{value:.2g}")


def _with_largest(reference: InMemory, t: Tensor, claims: tuple[str, ...]) -> Tensor:
    """The tensor with the largest tolerance of an element under each claim, for people."""
    if t.given or t.set or not any(f"bound.{part}" in t.extras for part in PARTS):
        return t

    largest: dict[str, float] = {}
    for name in claims:
        values, index = reference.judged(t)
        allowed = tolerance(reference, t, CLAIMS[name], values, index)
        if allowed is not None:
            largest[name] = float(f"{float(np.max(allowed.element)):.3g}")
    return replace(t, largest=largest)
