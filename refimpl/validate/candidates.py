"""The mistakes that a diagnosis tries, and what each computes in a case.  SPEC VERDICT-19, VERDICT-20.

A trial is first measured with the right program's sigma, which is one run; what comes near is measured again
with the sigma of the wrong program itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.programs import Outputs
from refimpl.validate.closeness import Closeness, closeness
from refimpl.validate.evidence import Exhibit, Noise
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change, both

SUBTLE = 30.0  # sigma that a deviation has in all, from which its share in the port's errors is trusted
SHARE = (0.7, 1.3)  # of a deviation that the port has, where single elements show nothing
SAME = 0.25  # the distance up to which two programs cannot be told apart


@dataclass(frozen=True)
class Candidate:
    """One mistake, or several at once."""

    mutants: tuple[Mutant, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(mutant.id for mutant in self.mutants)

    @property
    def change(self) -> Change:
        return both(*(mutant.change for mutant in self.mutants))

    def joined(self, other: Candidate) -> Candidate:
        return Candidate((*self.mutants, *other.mutants))


@dataclass(frozen=True)
class Trial:
    """A candidate in a case."""

    candidate: Candidate
    outputs: Outputs
    closeness: Closeness
    noise: Noise


class Bench:
    """An exhibit with the trials that were made on it."""

    def __init__(self, exhibit: Exhibit) -> None:
        self.exhibit = exhibit
        self.right = closeness(exhibit, exhibit.right_outputs, exhibit.right_noise)
        self._first: dict[tuple[str, ...], Trial | None] = {}
        self._second: dict[tuple[str, ...], Trial | None] = {}

    @property
    def id(self) -> str:
        return self.exhibit.case.id

    def first(self, candidate: Candidate) -> Trial | None:
        """With the right program's sigma; None where the candidate changes nothing, or cannot be."""
        if candidate.ids not in self._first:
            self._first[candidate.ids] = self._tried(candidate)
        return self._first[candidate.ids]

    def _tried(self, candidate: Candidate) -> Trial | None:
        exhibit = self.exhibit
        outputs = exhibit.outputs(candidate.change)
        if outputs is None:
            return None
        found = closeness(exhibit, outputs, exhibit.right_noise)
        return Trial(candidate, outputs, found, exhibit.right_noise) if found.active else None

    def second(self, candidate: Candidate) -> Trial | None:
        """With its own sigma."""
        if candidate.ids not in self._second:
            trial = self.first(candidate)
            noise = None if trial is None else self.exhibit.noise(candidate.change, trial.outputs)
            if trial is not None and noise is not None:
                near = closeness(self.exhibit, trial.outputs, noise)
                trial = Trial(candidate, trial.outputs, near, noise)
            self._second[candidate.ids] = None if noise is None else trial
        return self._second[candidate.ids]

    def near(self, candidates: Sequence[Candidate], count: int) -> list[Trial]:
        """The candidates that come nearest to the port, and nearer than the right program."""
        trials = [self.first(candidate) for candidate in candidates]
        better = [t for t in trials if t is not None and t.closeness.distance < self.right.distance]
        return sorted(better, key=lambda t: t.closeness.distance)[:count]

    def explains(self, trial: Trial | None) -> bool:
        """The port's numbers are the candidate's, and not the right ones."""
        if trial is None or not trial.closeness.active or not trial.closeness.fits:
            return False
        found = trial.closeness
        if not self.right.fits:
            return found.distance < self.right.distance
        shared = SHARE[0] <= found.share <= SHARE[1] and found.strength > SUBTLE
        return shared and found.distance < self.right.distance

    def contradicts(self, trial: Trial | None) -> bool:
        """The candidate would show in this case, and the port does not have it."""
        if trial is None or not trial.closeness.active:
            return False
        found = trial.closeness
        return not found.fits or (found.strength > 2.0 * SUBTLE and found.share < 0.5)

    def same(self, one: Trial, other: Trial) -> bool:
        """Two programs whose numbers roundings could exchange."""
        exhibit = self.exhibit
        a, b = exhibit.vector(one.outputs), exhibit.vector(other.outputs)
        with np.errstate(all="ignore"):
            z = np.abs(a - b) / one.noise.sigma
        z = np.where(a == b, 0.0, np.where(np.isfinite(z), z, 1e8))
        if not len(z):
            return True
        logs = np.bincount(exhibit.of, np.log1p(z * z)) / np.bincount(exhibit.of)
        return bool(np.max(logs) <= SAME)

    def silent(self, candidate: Candidate) -> bool:
        trial = self.first(candidate)
        return trial is None or not trial.closeness.active


def candidates(mutants: Sequence[Mutant], claim: str) -> list[Candidate]:
    """Those that are mistakes under a claim: benign ones are none, nor is what its roundings exceed."""
    return [Candidate((mutant,)) for mutant in mutants if not mutant.benign and claim in mutant.claims]
