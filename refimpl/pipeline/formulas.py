"""Bubbles by formula, with the durations for which they are true.  SPEC PIPE-28 to PIPE-32.

`published` has what papers print, mostly table 2 of the DeepSeek-V3 report; `closed` has forms that hold for
any durations.  Both take B for a whole backward, I + W; the zero-bubble papers write B for what is I here.

"Bubble" has two published meanings, which `Published.meaning` names:
    idle                makespan - busy                                              (the report, 1F1B, GPipe)
    idle within span    idle between a rank's own first and last action              (the zero-bubble papers)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from refimpl.errors import Invalid
from refimpl.pipeline.orders import follows
from refimpl.pipeline.rules import RULES
from refimpl.pipeline.simulate import Durations, Timeline

IDLE, SPAN = "idle", "idle within span"
EVERY, MOST = "every rank", "the rank that idles the most"
Requirement = tuple[bool, str]


@dataclass(frozen=True)
class Published:
    """A published formula at one point.

    Where it applies, the value is the most that a rank idles (`Timeline.idle`, or `idle_within_span`, as
    `meaning` says); `reason` says on which ranks, or what is missing.
    """

    text: str
    value: int
    meaning: str
    applies: bool
    reason: str


@dataclass(frozen=True)
class Closed:
    """`Timeline.idle` of each rank by a form for any durations; if it does not apply, `reason` says why."""

    text: str
    idle: tuple[int, ...]
    applies: bool
    reason: str


class Point(NamedTuple):
    """Where a formula is asked for: P ranks, M microbatches, V chunks of each rank, durations."""

    P: int
    M: int
    V: int
    d: Durations

    @property
    def m(self) -> int:
        return min(self.M, self.P)


def published(
    name: str, ranks: int, microbatches: int, durations: Durations, chunks: int | None = None
) -> Published:
    """What is published for a schedule, and whether it is true here.  Raises Invalid for an unknown name, and
    for ranks, microbatches or chunks below 1."""
    point, alike = _point(name, ranks, microbatches, durations, chunks)
    formula = PUBLISHED[name]
    requirements = [*alike, (durations.latency == 0, "latency 0"), *formula.region(point)]
    broken = [text for met, text in requirements if not met]
    where = formula.where(point)
    reason = f"it needs {' and '.join(broken)}" if broken else f"it holds on {where}"
    return Published(formula.text, formula.value(point), formula.meaning, not broken, reason)


def closed(
    name: str, ranks: int, microbatches: int, durations: Durations, chunks: int | None = None
) -> Closed:
    """Each rank's idle for any durations, and whether it is that here.  Raises Invalid as `published`."""
    point, alike = _point(name, ranks, microbatches, durations, chunks)
    formula = CLOSED[name]
    broken = [text for met, text in (*alike, *formula.region(point)) if not met]
    reason = f"it needs {' and '.join(broken)}" if broken else f"it holds on {EVERY}"
    return Closed(formula.text, tuple(formula.idle(point)), not broken, reason)


def beside(timeline: Timeline) -> tuple[Published, Closed]:
    """Both for a schedule that was simulated and has the name of a rule; neither applies to another order."""
    schedule = timeline.schedule
    at = (schedule.size, schedule.microbatches, timeline.durations, len(schedule.placement[0]) or None)
    both = published(schedule.name, *at), closed(schedule.name, *at)
    if follows(schedule):
        return both
    reason = f"its order is not that of {schedule.name}"
    return replace(both[0], applies=False, reason=reason), replace(both[1], applies=False, reason=reason)


def _point(
    name: str, ranks: int, microbatches: int, durations: Durations, chunks: int | None
) -> tuple[Point, list[Requirement]]:
    """The point with its scale taken into the durations, and the demand that all stages have the same."""
    if name not in PUBLISHED:
        raise Invalid(f"there is no formula for the schedule {name!r}, but for {', '.join(PUBLISHED)}.")
    for word, number in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if number is not None and number < 1:
            raise Invalid(f"{word} is {number}, but has to be a whole number above 0.")
    scales = set(durations.scale)
    scale = scales.pop() if len(scales) == 1 else 1
    times = {kind: scale * getattr(durations, kind) for kind in ("F", "I", "W", "B", "FB")}
    even = replace(durations, **times, scale=())
    return Point(ranks, microbatches, chunks or RULES[name].chunks, even), [
        (not scales, "stages of the same scale")
    ]


# What is published


class Formula(NamedTuple):
    text: str
    value: Callable[[Point], int]
    region: Callable[[Point], Iterable[Requirement]]  # beside equal stages and no latency
    meaning: str = IDLE
    where: Callable[[Point], str] = lambda p: EVERY


def _anywhere(p: Point) -> list[Requirement]:
    return []


def _zb1p_region(p: Point) -> list[Requirement]:
    d, one = p.d, p.P == 1
    return [
        (d.I + d.W == d.B, "B = I + W"),
        (one or min(d.F, d.I) >= d.W, "W <= min(F, I)"),
        (one or p.M >= p.P, "M >= P"),
    ]


def _zbv_region(p: Point) -> list[Requirement]:
    d = p.d
    return [(p.P == 1 or d.F == d.I == d.W, "F = I = W"), (p.M >= 2 * p.P - 1, "M >= 2 P - 1")]


def _dual_legal(p: Point, stages: int) -> list[Requirement]:
    legal = [(p.M >= 2 * p.P, "M >= 2 P")]
    return [(p.P % 2 == p.M % 2 == 0, "P and M even"), *legal] if stages == p.P else legal


def _dual_region(p: Point, stages: int) -> list[Requirement]:
    d, two = p.d, stages == 2
    return [
        *_dual_legal(p, stages),
        (d.I + d.W == d.B, "B = I + W"),
        (two or d.F == d.I >= d.W, "F = I >= W"),
        (two or max(d.F, d.B) <= d.FB <= d.F + d.B, "max(F, B) <= F&B <= F + B"),
    ]


def _dual(p: Point, stages: int) -> int:
    return (stages // 2 - 1) * (p.d.FB + p.d.B - 3 * p.d.W)


def _dual_where(p: Point, stages: int) -> str:
    return EVERY if p.d.FB == p.d.F + p.d.B or stages <= 4 else MOST


_DUAL = "(PP/2 - 1)(F&B + B - 3W)"

PUBLISHED = {
    "gpipe": Formula("(P - 1)(F + B)", lambda p: (p.P - 1) * (p.d.F + p.d.B), _anywhere),
    "1f1b": Formula("(PP - 1)(F + B)", lambda p: (p.P - 1) * (p.d.F + p.d.B), _anywhere),
    "interleaved": Formula(
        "(P - 1)(F + B), times of a chunk",
        lambda p: (p.P - 1) * (p.d.F + p.d.B),
        lambda p: [(p.V == 1 or p.M >= p.P, "M >= P")],
    ),
    "zb1p": Formula("(PP - 1)(F + B - 2W)", lambda p: (p.P - 1) * (p.d.F + p.d.B - 2 * p.d.W), _zb1p_region),
    "zbv": Formula("0", lambda p: 0, _zbv_region, meaning=SPAN),
    "dualpipe": Formula(
        _DUAL,
        lambda p: _dual(p, p.P),
        lambda p: _dual_region(p, p.P),
        where=lambda p: _dual_where(p, p.P),
    ),
    "dualpipev": Formula(
        _DUAL,
        lambda p: _dual(p, 2 * p.P),
        lambda p: _dual_region(p, 2 * p.P),
        where=lambda p: _dual_where(p, 2 * p.P),
    ),
}


# What holds for any durations


class Form(NamedTuple):
    text: str
    idle: Callable[[Point], Sequence[int]]
    region: Callable[[Point], Iterable[Requirement]]


def _no_latency(p: Point) -> list[Requirement]:
    return [(p.d.latency == 0, "latency 0")]


def _gpipe_any(p: Point) -> list[int]:
    return [(p.P - 1) * (p.d.F + p.d.B + 2 * p.d.latency)] * p.P


def _1f1b_any(p: Point) -> list[int]:
    """The latency is paid about 2 (P - 1) times for every P microbatches, also in the steady state."""
    rounds, rest = divmod(p.M, p.P)
    paid = 2 * (p.P - 1) * rounds + 2 * (p.P - 2) + (2 * max(1, rest - 1) if rest else 0)
    return [(p.P - 1) * (p.d.F + p.d.B) + (paid * p.d.latency if p.P > 1 else 0)] * p.P


def _interleaved_any(p: Point) -> list[int]:
    return [(p.P - 1 + (p.V - 1) * (p.P - p.m)) * (p.d.F + p.d.B)] * p.P


def _zb1p_any(p: Point) -> list[int]:
    F, I, W, h = p.d.F, p.d.I, p.d.W, p.P - 1  # noqa: E741, N806  # the published names
    worst = max(h * F + (p.P - p.m) * I, h * (F + I) - (p.m - 1) * W, (p.P - p.m) * F + h * I)
    return [worst] * p.P


def _zbv_any(p: Point) -> list[int]:
    F, I, W, h = p.d.F, p.d.I, p.d.W, p.P - 1  # noqa: E741, N806
    worst = max(
        h * F,
        h * I,
        h * (F + I - 2 * W),
        2 * h * (I - W),
        I + (h - 1) * W,
        F + (h - 1) * W,
        (2 * h - 1) * F - (h - 1) * I,
        (2 * h - 1) * F + I - 2 * h * W,
        2 * h * F - h * I - W,
        2 * h * F - (2 * h + 1) * W,
    )
    return [worst if h else 0] * p.P


def _dual_any(p: Point, stages: int) -> list[int]:
    """The middle ranks idle for the critical path; those further out have fewer pairs and are busier."""
    F, I, W, B, FB = p.d.F, p.d.I, p.d.W, p.d.B, p.d.FB  # noqa: E741, N806
    h = stages // 2 - 1
    middle = max(
        h * F,
        h * I - F,
        h * (FB + F - B),
        h * (FB + F - 2 * W),
        h * (FB + I - 2 * W) - F,
        h * (FB - W) - F,
    )
    from_end = [min(r, stages - 1 - r) for r in range(p.P)]
    return [(middle if h else 0) - max(0, h - 1 - k) * (F + B - FB) for k in from_end]


def _dual_any_region(p: Point, stages: int) -> list[Requirement]:
    d, two = p.d, stages == 2
    return [
        *_no_latency(p),
        *_dual_legal(p, stages),
        (d.I + d.W == d.B, "B = I + W"),
        (two or max(d.F, d.B) <= d.FB, "F&B >= max(F, B)"),
    ]


_DUAL_ANY = (
    "max{hF, hI - F, h(F&B + F - B), h(F&B + F - 2W), h(F&B + I - 2W) - F, h(F&B - W) - F}"
    " - max(0, h - 1 - k)(F + B - F&B), h = PP/2 - 1, k = ranks to the nearer end; 0 for h = 0"
)

CLOSED = {
    "gpipe": Form("(P - 1)(F + B + 2L)", _gpipe_any, _anywhere),
    "1f1b": Form(
        "(P - 1)(F + B) + cL, c = 2(P - 1)q + 2(P - 2) + (2 max(1, j - 1) if j), q, j = divmod(M, P)",
        _1f1b_any,
        _anywhere,
    ),
    "interleaved": Form("(P - 1 + (V - 1)(P - m))(F + B), m = min(M, P)", _interleaved_any, _no_latency),
    "zb1p": Form(
        "max{(P - 1)F + (P - m)I, (P - 1)(F + I) - (m - 1)W, (P - m)F + (P - 1)I}, m = min(M, P)",
        _zb1p_any,
        _no_latency,
    ),
    "zbv": Form(
        "max{hF, hI, h(F + I - 2W), 2h(I - W), I + (h - 1)W, F + (h - 1)W, (2h - 1)F - (h - 1)I,"
        " (2h - 1)F + I - 2hW, 2hF - hI - W, 2hF - (2h + 1)W}, h = P - 1; 0 for h = 0",
        _zbv_any,
        lambda p: [*_no_latency(p), (p.M >= 2 * p.P - 1, "M >= 2 P - 1")],
    ),
    "dualpipe": Form(_DUAL_ANY, lambda p: _dual_any(p, p.P), lambda p: _dual_any_region(p, p.P)),
    "dualpipev": Form(_DUAL_ANY, lambda p: _dual_any(p, 2 * p.P), lambda p: _dual_any_region(p, 2 * p.P)),
}
