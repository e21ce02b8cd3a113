"""Whether numbers are close enough to the exact ones.  SPEC VERDICT-5 to VERDICT-7.

A tensor holds when three things do:

    element   |theirs - ours| <= bound of that element, for every element
    spread    the root mean square of the errors <= SPREAD times that of the noise floor
    bias      |sum(error * ours) / sum(ours^2)|, the common factor in which it is off, <= BIAS times the
    noise's

The bound grows with the length of sums as if all roundings conspired, so it is loose where sums are long;
spread and bias are not, and catch what is a little wrong everywhere.  NaN and infinities never pass, except
where the exact value is an infinity (a masked score): there anything below -1e4 of its sign, or the
infinity, passes.

SPREAD is 4: independent roundings reach 1.3 times the noise's model at most (roundings are uniform, the
model's largest possible), kernels that store twice in a step sqrt(2), tables rounded once for all tokens do
not average out;
the product of these is below 3.  BIAS is 6, since one number is averaged over few runs only.  For tensors
of few elements the root mean square is itself a random number: SPREAD grows by 4 / sqrt(elements).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from refimpl.cases.claims import Claim
from refimpl.numerics.arithmetic import Array

SPREAD = 4.0
BIAS = 6.0
MASKED = 1e4


@dataclass(frozen=True)
class Tolerance:
    """What one claim allows for a tensor: per judged element, and for all of them together."""

    element: Array  # broadcasts against the judged elements
    spread: float
    bias: float


@dataclass(frozen=True)
class Distance:
    """How far a tensor is off.  `at` is the position of the worst element among those judged."""

    holds: bool
    at: int
    ours: float
    theirs: float
    absolute: float
    relative: float
    ulps: float
    excess: float  # worst |error| / bound
    outside: float  # share of elements outside of their bound
    spread: float  # of the errors, over what is allowed
    bias: float  # common factor in which it is off
    bias_excess: float  # the same, over what is allowed
    reason: str  # empty when it holds


def measure(ours: Array, theirs: Array, tolerance: Tolerance | None, claim: Claim) -> Distance:
    """ours, theirs (n,) float64, n > 0  ->  the distance.  Without a tolerance they have to be equal."""
    masked = np.isinf(ours) & (np.sign(theirs) == np.sign(ours)) & (np.abs(theirs) > MASKED)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.where(masked, 0.0, theirs - ours)
    broken = ~np.isfinite(error)
    size = np.where(broken, np.inf, np.abs(error))
    bound = np.zeros(ours.shape) if tolerance is None else np.broadcast_to(tolerance.element, ours.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        excess = np.where(size == 0.0, 0.0, np.where(broken, np.inf, size / bound))
    at = int(np.argmax(np.where(excess == excess.max(), size, -1.0)))
    spread, bias = _together(ours, error, broken)
    allowed_spread = 0.0 if tolerance is None else tolerance.spread
    allowed_bias = 0.0 if tolerance is None else tolerance.bias
    share = float(np.mean(excess > 1.0))
    worst = float(size[at])
    distance = Distance(
        holds=False,
        at=at,
        ours=float(ours[at]),
        theirs=float(theirs[at]),
        absolute=worst,
        relative=_over(worst, abs(float(ours[at]))),
        ulps=_over(worst, float(claim.ulp(ours[at]))) if math.isfinite(ours[at]) else math.inf,
        excess=float(excess[at]),
        outside=share,
        spread=_over(spread, allowed_spread),
        bias=bias,
        bias_excess=_over(abs(bias), allowed_bias),
        reason="",
    )
    return _decided(distance, bool(broken.any()))


def worst_excess(distance: Distance) -> float:
    """By what factor the tensor misses the test that it misses most."""
    return max(distance.excess, distance.spread, distance.bias_excess)


def spread_factor(count: int) -> float:
    """SPREAD for a tensor of `count` judged elements."""
    return SPREAD + 4.0 / math.sqrt(max(count, 1))


def _together(ours: Array, error: Array, broken: Array) -> tuple[float, float]:
    if broken.any():
        return math.inf, math.inf
    finite = np.where(np.isinf(ours), 0.0, ours)
    scale = float(np.max(np.abs(finite), initial=0.0)) or 1.0  # so that squares neither overflow nor vanish
    e, y = error / scale, finite / scale
    with np.errstate(over="ignore"):
        spread = float(np.sqrt(np.mean(e * e))) * scale
        power = float(np.sum(y * y))
        return spread, (float(np.sum(e * y)) / power if power else 0.0)


def _over(value: float, allowed: float) -> float:
    return 0.0 if value == 0.0 else math.inf if allowed == 0.0 else value / allowed


def _decided(d: Distance, broken: bool) -> Distance:
    if broken:
        return replace(d, reason="NaN or infinity")
    if d.excess > 1.0:
        return replace(d, reason="elements outside of their bound")
    if d.spread > 1.0:
        return replace(d, reason="errors spread wider than roundings do")
    if d.bias_excess > 1.0:
        return replace(d, reason="off by a common factor")
    return replace(d, holds=True)
