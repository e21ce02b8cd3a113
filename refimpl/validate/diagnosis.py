"""Which mistake makes a port's numbers.  SPEC VERDICT-19 to VERDICT-21.

Every known mistake is a program.  The one whose numbers are the port's, in all cases that fail and in none
that passes otherwise, is named; where several have the same numbers, all of them are.  What one mistake
leaves unexplained is tried with others, then with pairs.  Where nothing fits, nothing is named.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from refimpl.cases.claims import Claim
from refimpl.programs import PROGRAMS
from refimpl.validate.accounts import Account, account
from refimpl.validate.candidates import Bench, Candidate, Trial, candidates
from refimpl.validate.evidence import Evidence, Exhibit
from refimpl.variants.mutants.mutant import Mutant

BUDGET = 25.0  # seconds of processor time, so that a busy machine changes nothing but the wait
WORK = 8_000_000  # elements of the failing cases that are read
MOST = 10  # cases in which every candidate is tried
NEAREST = 8  # candidates of a case that are measured with their own sigma
PARTNERS = 6  # mistakes that are tried in pairs with all others
FULL = 4  # cases in which every candidate is tried, though one is known that fits
PAIRED = 4  # unexplained cases in which pairs are searched
CERTAIN = (
    1.0  # nats by which a mistake has to be nearer than the right program when a passing case is against it
)
WORSE = 0.5  # nats by which a mistake is farther from the port than the right program, to speak against it
DIFFERENT = 0.05  # of two distances of a tensor
ACCOUNTS = 3  # unexplained cases of which more is said
PARTS = tuple(PROGRAMS)  # components, the smaller first
PASSING = 24  # passing cases that are asked whether they contradict


@dataclass(frozen=True)
class Finding:
    """A mistake, or the mistakes that cannot be told from it, with the cases that it explains.

    names: alternatives, each the ids of one mistake or of a pair.  distance: of the port's numbers from the
    mistake's; next_distance and next_name: from those of the next candidate, () for the right program; apart:
    how much farther that is, over the tensors in which the two differ.
    """

    names: tuple[tuple[str, ...], ...]
    cases: tuple[str, ...]
    distance: float
    next_distance: float
    next_name: tuple[str, ...]
    apart: float
    share: float
    agreeing: int  # passing cases that were asked
    against: tuple[str, ...]  # those of them that it would change, though the port is right there
    rivals: int  # mistakes of other numbers that these cases do not exclude

    @property
    def certain(self) -> bool:
        """Nothing else explains these cases, and nothing speaks against it."""
        return not self.rivals and not self.against

    @property
    def closer(self) -> float:
        """How many times nearer the mistake's numbers are than the next candidate's, typically."""
        return math.exp(min(60.0, max(0.0, self.apart) / 2.0))


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a port."""

    claim: str
    findings: tuple[Finding, ...]
    explained: tuple[str, ...]  # failing cases
    unexplained: tuple[str, ...]
    unread: tuple[str, ...]  # failing cases that were not needed, or for which there was no time
    accounts: tuple[Account, ...]  # of some of the unexplained cases, the simplest first
    seconds: float


def diagnose(
    failing: Sequence[Evidence],
    claim: Claim,
    passing: Sequence[Evidence] = (),
    mutants: Sequence[Mutant] | None = None,
    budget: float = BUDGET,
) -> Diagnosis:
    """failing, passing: cases of numbers with what the port wrote.  Raises Unreadable."""
    search = Search(claim, _known() if mutants is None else mutants, budget)
    return search.run(failing, passing)


def _known() -> Sequence[Mutant]:
    from refimpl.variants.mutants import MUTANTS  # the whole table, read when it is asked for

    return tuple(MUTANTS.values())


class Search:
    """One diagnosis."""

    def __init__(self, claim: Claim, mutants: Sequence[Mutant], budget: float) -> None:
        self.claim, self.all = claim, candidates(mutants, claim.name)
        self.start, self.budget = time.process_time(), budget
        self.passing: list[Evidence] = []
        self._asked: dict[int, Bench | None] = {}
        self.benches: list[Bench] = []  # the failing cases that were read
        self.full: list[Bench] = []  # those in which every candidate was tried
        self.known: dict[tuple[str, ...], Candidate] = {}  # those that explain a case
        self.fits: dict[tuple[str, ...], dict[str, Trial]] = {}  # ids -> case -> how

    def left(self, share: float) -> bool:
        return time.process_time() - self.start < share * self.budget

    def run(self, failing: Sequence[Evidence], passing: Sequence[Evidence]) -> Diagnosis:
        self.passing = _spread(passing)[:PASSING]
        unread = self._read(failing)
        findings, remaining = self._cover()
        more, remaining = self._pairs(remaining, findings)
        return Diagnosis(
            self.claim.name,
            (*findings, *more),
            tuple(b.id for b in self.benches if b not in remaining),
            tuple(b.id for b in remaining),
            tuple(unread),
            self._accounts(remaining),
            time.process_time() - self.start,
        )

    def _read(self, failing: Sequence[Evidence]) -> list[str]:
        """Every candidate is tried in the first cases and wherever nothing known fits.  Gives the cases for
        which there was no time."""
        unread: list[str] = []
        work = 0
        for evidence in _spread(failing):
            if self.benches and (work > WORK or not self.left(0.7)):
                unread.append(evidence.folder.case.id)
                continue
            bench = self._bench(evidence)
            if bench is None:
                continue
            self.benches.append(bench)
            work += _cost(evidence)
            for ids, own in self.fits.items():
                self._try(bench, self.known[ids], own)
            explained = any(bench.id in own for own in self.fits.values())
            if len(self.full) < FULL or (not explained and len(self.full) < MOST):
                self.full.append(bench)
                for trial in bench.near(self.all, NEAREST):
                    if trial.candidate.ids not in self.fits:
                        self._add(bench, trial.candidate)
        return unread

    def _try(self, bench: Bench, candidate: Candidate, into: dict[str, Trial]) -> None:
        trial = bench.second(candidate)
        if trial is not None and bench.explains(trial):
            into[bench.id] = trial

    def _add(self, bench: Bench, candidate: Candidate) -> None:
        """A candidate that explains a case is tried in all those that were read."""
        own: dict[str, Trial] = {}
        self._try(bench, candidate, own)
        if not own:
            return
        for other in self.benches:
            if other is not bench:
                self._try(other, candidate, own)
        self.fits[candidate.ids], self.known[candidate.ids] = own, candidate

    def _accounts(self, benches: list[Bench]) -> tuple[Account, ...]:
        """Of the smallest components first, for what is wrong in a part is wrong in the whole."""
        ranked = sorted(
            benches, key=lambda b: (PARTS.index(b.exhibit.case.component), b.exhibit.case.backward)
        )
        return tuple(account(b.exhibit.evidence, self.claim) for b in ranked[:ACCOUNTS])

    def _bench(self, evidence: Evidence) -> Bench | None:
        exhibit = Exhibit(evidence, self.claim)
        return Bench(exhibit) if exhibit.size or exhibit.sets else None

    # one mistake for as many cases as possible

    def _cover(self) -> tuple[list[Finding], list[Bench]]:
        findings: list[Finding] = []
        remaining = list(self.benches)
        while remaining:
            best = self._best(remaining)
            if best is None:
                break
            findings.append(self._finding(best, remaining))
            remaining = [b for b in remaining if b.id not in self.fits[best.ids]]
        return findings, remaining

    def _best(self, remaining: list[Bench]) -> Candidate | None:
        """The one that explains most.  A passing case that would show it speaks against it: then it must
        explain twice as much as any other, and leave no doubt; it is in one place of the port and not in
        another."""
        refuted = [c for c in self.known.values() if self._refuted(c)]
        ranked = [c for c in self._ranked(remaining) if c not in refuted and not self._coincides(c, refuted)]
        free = next((c for c in ranked if not self._against(c)), None)
        for candidate in ranked:
            if candidate is free:
                break
            here = [b for b in remaining if b.id in self.fits[candidate.ids]]
            others = sum(b.id in self.fits[free.ids] for b in remaining) if free else 0
            gains = [b.right.distance - self.fits[candidate.ids][b.id].closeness.distance for b in here]
            if len(here) >= 2 * others and max(gains) > CERTAIN:
                return candidate
        return free

    def _refuted(self, candidate: Candidate) -> bool:
        """It makes worse what it does not explain: its numbers coincide in some cases only."""
        own = self.fits[candidate.ids]
        rest = [(b, b.first(candidate)) for b in self.benches if b.id not in own and self._alone(b)]
        worse = [b for b, t in rest if t is not None and t.closeness.distance > b.right.distance + WORSE]
        return len(worse) > len(own)

    def _coincides(self, candidate: Candidate, refuted: Sequence[Candidate]) -> bool:
        """One that is refuted comes nearer in the very cases that it explains: they prove nothing."""
        own = self.fits[candidate.ids]

        def total(ids: tuple[str, ...]) -> float:
            return math.fsum(self.fits[ids][case].closeness.distance for case in own)

        wider = [c.ids for c in refuted if own.keys() <= self.fits[c.ids].keys()]
        return any(total(ids) < total(candidate.ids) for ids in wider)

    def _alone(self, bench: Bench) -> bool:
        """Nothing explains this case."""
        return not any(bench.id in own for own in self.fits.values())

    def _ranked(self, benches: list[Bench]) -> list[Candidate]:
        """Most cases first; then fewest that it touches and does not explain; then the nearest."""

        def key(ids: tuple[str, ...]) -> tuple[int, int, int, float]:
            own = self.fits[ids]
            here = [b for b in benches if b.id in own]
            distance = _mean([own[b.id].closeness.distance for b in here])
            spoiled = [b for b in benches if b.id not in own and not b.silent(self.known[ids])]
            return len(here), -len(spoiled), -len(ids), -distance

        able = [ids for ids, own in self.fits.items() if any(b.id in own for b in benches)]
        return [self.known[ids] for ids in sorted(able, key=key, reverse=True)]

    def _against(self, candidate: Candidate) -> tuple[str, ...]:
        """Passing cases that would show it."""
        return tuple(b.id for b in self._witnesses() if b.contradicts(b.second(candidate)))

    def _witnesses(self) -> list[Bench]:
        """The passing cases, read when they are needed."""
        for i, evidence in enumerate(self.passing):
            if i not in self._asked and self.left(0.85):
                self._asked[i] = self._bench(evidence)
        return [bench for bench in self._asked.values() if bench is not None]

    def _finding(self, best: Candidate, benches: list[Bench]) -> Finding:
        fits = self.fits[best.ids]
        here = [b for b in benches if b.id in fits]
        names, against = [best.ids], self._against(best)
        for ids, own in self.fits.items():
            alike = all(b.id in own and b.same(fits[b.id], own[b.id]) for b in here)
            if (
                ids != best.ids
                and len(ids) == len(best.ids)
                and alike
                and self._against(self.known[ids]) == against
            ):
                names.append(ids)
        fitting = [ids for ids, own in self.fits.items() if all(b.id in own for b in here)]
        apart = [ids for ids in fitting if ids not in names and len(ids) == len(best.ids)]
        rivals = sum(self._against(self.known[ids]) <= against for ids in apart)
        compared = [b for b in here if b in self.full] or here[:1]
        distance, following, name, gap = self._runner_up(compared, fits, names)
        share = _mean([fits[b.id].closeness.share for b in here])
        cases = tuple(b.id for b in here)
        return Finding(
            tuple(names),
            cases,
            distance,
            following,
            name,
            gap,
            share,
            len(self._witnesses()),
            against,
            rivals,
        )

    def _runner_up(
        self, benches: list[Bench], fits: dict[str, Trial], names: list[tuple[str, ...]]
    ) -> tuple[float, float, tuple[str, ...], float]:
        """The distance, that of the nearest candidate of another name, that name, () for the right program,
        and how far the two are apart."""
        ranked: list[tuple[float, tuple[str, ...]]] = [(_mean([b.right.distance for b in benches]), ())]
        for candidate in self.all:
            if candidate.ids not in names:
                known = candidate.ids in self.fits
                trials = [(b, b.second(candidate) if known else b.first(candidate)) for b in benches]
                own = [b.right.distance if t is None else t.closeness.distance for b, t in trials]
                if not known or not self._against(candidate):
                    ranked.append((_mean(own), candidate.ids))
        distance = _mean([fits[b.id].closeness.distance for b in benches])
        following, name = min(ranked)
        apart = []
        for b in benches:
            trial = next((b.first(c) for c in self.all if c.ids == name), None)
            other = b.right if trial is None else trial.closeness
            pairs = zip(fits[b.id].closeness.tensors, other.tensors, strict=True)
            apart += [theirs - own for own, theirs in pairs if abs(theirs - own) > DIFFERENT]
        return distance, following, name, _mean(apart)

    # two mistakes at once

    def _pairs(self, remaining: list[Bench], found: list[Finding]) -> tuple[list[Finding], list[Bench]]:
        findings: list[Finding] = []
        by_ids = {c.ids: c for c in self.all}
        named = [by_ids[f.names[0]] for f in found]
        for bench in remaining[:PAIRED]:
            if not self.left(0.9):
                break
            if any(bench.id in own for own in self.fits.values()):
                continue
            firsts = named + [t.candidate for t in bench.near(self.all, PARTNERS)]
            for pair in self._partners(bench, list(dict.fromkeys(firsts))):
                self._add(bench, pair)
        while remaining:
            best = self._best(remaining)
            if best is None:
                break
            findings.append(self._finding(best, remaining))
            remaining = [b for b in remaining if b.id not in self.fits[best.ids]]
        return findings, remaining

    def _partners(self, bench: Bench, firsts: list[Candidate]) -> list[Candidate]:
        """The nearest pairs."""
        trials: list[Trial] = []
        for first in firsts:
            for other in self.all:
                if not self.left(0.9):
                    break
                if other.ids == first.ids or bench.silent(other):
                    continue
                trial = bench.first(first.joined(other))
                alone = bench.first(first)
                limit = bench.right.distance if alone is None else alone.closeness.distance
                if trial is not None and trial.closeness.distance < limit:
                    trials.append(trial)
        trials.sort(key=lambda t: t.closeness.distance)
        return [t.candidate for t in trials[:NEAREST]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _cost(evidence: Evidence) -> int:
    return sum(t.size for t in evidence.folder.case.tensors)


def _spread(given: Sequence[Evidence]) -> list[Evidence]:
    """The smallest case of every component first, then the second smallest, and so on."""
    turns: dict[str, int] = {}
    keyed: list[tuple[int, int, Evidence]] = []
    for evidence in sorted(given, key=_cost):
        kind = f"{evidence.folder.case.component} {evidence.folder.case.backward}"
        turns[kind] = turns.get(kind, 0) + 1
        keyed.append((turns[kind], _cost(evidence), evidence))
    return [evidence for _, _, evidence in sorted(keyed, key=lambda item: item[:2])]
