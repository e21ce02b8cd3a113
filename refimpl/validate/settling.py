"""One alternative of a choice for a whole port, or two cases that contradict each other.  SPEC VERDICT-13."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.config.choices import CHOICES

Alternatives = Mapping[str, Any]
_Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Evidence:
    """What one case says about choices.

    own: the case's alternatives.  explained: alternatives under which an output holds that does not hold
    under the case's own.  refuted: of a case that holds, what it shows that the port does not do.
    """

    id: str
    own: Alternatives
    explained: tuple[Alternatives, ...] = ()
    refuted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A choice and what the port does.  own: it does what each case says."""

    choice: str
    alternative: Any
    own: bool
    cases: tuple[str, ...]

    @property
    def text(self) -> str:
        does = next(c for c in CHOICES if c.name == self.choice).alternatives.get(self.alternative, "")
        shown = ", ".join(self.cases[:4]) + (
            f" and {len(self.cases) - 4} more" if len(self.cases) > 4 else ""
        )
        what = f" ({does})" if does else ""
        return f"{self.choice} = {self.alternative}{what}, seen in {shown}"


@dataclass(frozen=True)
class Inconsistent:
    """A choice of which the port takes one alternative here, and another one there."""

    choice: str
    first: str
    first_alternative: Any
    second: str
    second_alternative: Any

    @property
    def text(self) -> str:
        return (
            f"choice {self.choice} is {self.first_alternative} in {self.first}, but "
            f"{self.second_alternative} in {self.second}; a port must take one alternative in all cases"
        )


@dataclass(frozen=True)
class Settled:
    """assigned: case -> the alternatives that explain its output."""

    seen: tuple[Seen, ...]
    inconsistent: tuple[Inconsistent, ...]
    assigned: Mapping[str, Alternatives]

    @property
    def known(self) -> Alternatives:
        """The alternatives that are not the cases' own."""
        return {s.choice: s.alternative for s in self.seen if not s.own}


def settle(evidence: Sequence[Evidence]) -> Settled:
    """From all cases.  Of several explanations that of most cases counts, and one that no case refutes."""
    assigned = _assigned(evidence)
    seen: list[Seen] = []
    inconsistent: list[Inconsistent] = []
    for choice in CHOICES:
        shown = [(id, changes[choice.name]) for id, changes in assigned.items() if choice.name in changes]
        if shown:
            value = shown[0][1]
            others = [(id, other) for id, other in shown if other != value]
            others += [
                (e.id, e.own[choice.name]) for e in evidence if value in e.refuted.get(choice.name, ())
            ]
            if others:
                inconsistent.append(Inconsistent(choice.name, *shown[0], *others[0]))
            cases = [id for id, other in shown if other == value]
            seen.append(Seen(choice.name, value, False, tuple(cases)))
            continue
        by_value: dict[Any, list[str]] = {}
        for e in evidence:
            if e.refuted.get(choice.name):
                by_value.setdefault(e.own[choice.name], []).append(e.id)
        seen += [Seen(choice.name, value, True, tuple(cases)) for value, cases in by_value.items()]
    return Settled(tuple(seen), tuple(inconsistent), assigned)


def _assigned(evidence: Sequence[Evidence]) -> dict[str, Alternatives]:
    counts: Counter[_Key] = Counter(_key(changes) for e in evidence for changes in e.explained)
    refuted = {(name, value) for e in evidence for name, values in e.refuted.items() for value in values}

    def rank(changes: Alternatives) -> tuple[bool, int, int]:
        return any(item in refuted for item in changes.items()), -counts[_key(changes)], len(changes)

    return {e.id: min(e.explained, key=rank) for e in evidence if e.explained}


def _key(changes: Alternatives) -> _Key:
    return tuple(sorted(changes.items()))
