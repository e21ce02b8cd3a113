"""How close a program's numbers are to a port's.  SPEC VERDICT-19.

z = (port - program) / sigma, element by element.  The distance of a tensor is the mean of log(1 + z^2),
which counts orders of magnitude and is not ruled by the largest element; that of a case is the mean over its
tensors.  Where the program or the port leaves the right values by more than OFF sigma, the share of elements
is counted that the program reproduces to within OFF sigma: what is explained.

A probe that is right in the port may differ in the program: where a mistake stands between two tensors, a
port may hand out either.  What is required has to agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arithmetic import Array
from refimpl.programs import Outputs
from refimpl.validate.evidence import Exhibit, Noise

OFF = 8.0  # sigma: beyond what roundings do to an element
NEAR = 2.0  # the distance of a tensor that roundings explain: that of normal errors of 2.5 sigma
EXPLAINED = 0.9  # of the elements of a tensor, below which a program does not explain it
WRONG_SET = 7.0  # the distance of a row whose experts differ: that of an error of 33 sigma
PASSED = 1.0  # the distance of a probe that is right in the port, and not in the program
LARGEST = 1e8  # z beyond which all is the same


@dataclass(frozen=True)
class Closeness:
    """Of one program to the port in one case."""

    distance: float
    tensors: tuple[float, ...]  # the distances, in the order of the exhibit's tensors and then its sets
    explained: tuple[float, ...]  # per tensor, 1 where nothing is off
    active: bool  # the program leaves the right values
    share: float  # of the program's deviation from the right values that the port has: 1 is all of it
    strength: float  # that deviation in sigma, all elements together

    @property
    def fits(self) -> bool:
        """The port's numbers are this program's, up to roundings."""
        return max(self.tensors, default=0.0) <= NEAR and min(self.explained, default=1.0) >= EXPLAINED


def closeness(exhibit: Exhibit, outputs: Outputs, noise: Noise) -> Closeness:
    """noise: of this program, or of the right one when it is not known."""
    program = exhibit.vector(outputs)
    keep, wrong = exhibit.agreeing(outputs, noise)
    sigma = noise.sigma
    found = [_one(exhibit, port, program, sigma, keep, wrong) for port in exhibit.port]
    return min(found, key=lambda one: one.distance)


def _one(
    exhibit: Exhibit, port: Array, program: Array, sigma: Array, keep: Array, wrong: dict[str, Array]
) -> Closeness:
    of, count = exhibit.of, len(exhibit.tensors)
    right = exhibit.right
    z, moved = _apart(port, program, sigma), _apart(program, right, sigma)
    off = _apart(port, right, exhibit.right_noise.sigma)
    logs = np.log1p(z * z)
    there = np.bincount(of[keep], minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = np.bincount(of[keep], logs[keep], count) / there
        concerned = keep & ((off > OFF) | (moved > OFF))
        affected = np.bincount(of[concerned], minlength=count)
        explained = np.bincount(of[concerned], z[concerned] <= OFF, count) / affected
    distances = np.where(there == 0, 0.0, distances)
    explained = np.where(affected == 0, 1.0, explained)
    passed = exhibit.passed & (distances > NEAR)
    distances = np.where(passed, PASSED, distances)
    explained = np.where(passed, 1.0, explained)
    rows = [WRONG_SET * float(np.mean(differs)) for differs in wrong.values()]
    both = [*distances.tolist(), *rows]
    with np.errstate(all="ignore"):
        d = np.where(keep & np.isfinite(program - right), (program - right) / sigma, 0.0)
        e = np.where(keep & np.isfinite(port - right), (port - right) / sigma, 0.0)
        # Large deviations would drown the rest: each element counts up to OFF.
        limit = OFF / np.maximum(np.abs(d), OFF)
        power = float(np.sum((d * limit) ** 2))
        share = float(np.sum(d * e * limit * limit)) / power if power else 0.0
    active = bool((moved[keep] > OFF).any()) or power > 20.0 * len(d) ** 0.5
    return Closeness(
        float(np.mean(both)) if both else 0.0,
        tuple(both),
        tuple(explained.tolist()),
        active,
        share,
        float(np.sqrt(power)),
    )


def _apart(a: Array, b: Array, sigma: Array) -> Array:
    """|a - b| / sigma, 0 for equal infinities and masked scores, at most LARGEST."""
    with np.errstate(all="ignore"):
        z = np.abs(a - b) / sigma
    masked = np.isinf(a) & np.isinf(b) & (np.sign(a) == np.sign(b))
    masked |= np.isinf(b) & (np.sign(a) == np.sign(b)) & (np.abs(a) > 1e4)
    masked |= np.isinf(a) & (np.sign(a) == np.sign(b)) & (np.abs(b) > 1e4)
    z = np.where(masked, 0.0, np.where(np.isnan(z), LARGEST, z))
    return np.asarray(np.minimum(z, LARGEST))
