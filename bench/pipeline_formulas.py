"""Where the published formulas hold, and those for any durations: simulated over a grid."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from tabulate import tabulate

from refimpl.errors import Invalid
from refimpl.pipeline import formulas, memory
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Schedule
from refimpl.pipeline.simulate import Durations, sequence, timed

RANKS = (1, 2, 3, 4, 5, 6, 8, 12)
DRAWS = 60
LARGEST = 200  # P M of what is simulated
CHUNKS = {"interleaved": (2, 3, 4)}
PEAKS_UP_TO = 16  # ranks


class Seen(NamedTuple):
    """A simulation beside both formulas."""

    schedule: Schedule
    durations: Durations
    published: formulas.Published
    most: bool  # the published value is that of the rank with the most
    every: bool  # and of all others
    closed: formulas.Closed
    equal: bool


def grid(ranks: tuple[int, ...] = RANKS, largest: int = LARGEST) -> Iterator[Schedule]:
    """Every schedule at each number of ranks, with few microbatches and with many."""
    for name in RULES:
        for p in ranks:
            several = (1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 2, 3 * p, 3 * p + 2, 5 * p)
            for m in sorted(set(several)):
                for chunks in CHUNKS.get(name, (None,)):
                    if m > 0 and p * m <= largest:
                        with suppress(Invalid):  # its rule does not allow this size
                            yield plan(name, p, m, chunks)


def drawn(rng: random.Random, latency: bool) -> Durations:
    """Any durations, half of them on the borders of the regions."""
    forward, inputs, weights = (rng.randint(0, 30) for _ in range(3))
    form = rng.randrange(6)
    if form < 3:
        inputs = forward
    if form in (1, 4):
        weights = rng.randint(0, min(forward, inputs))
    if form == 2:
        weights = forward
    backward = inputs + weights
    both = forward + backward
    pair = rng.choice((both, rng.randint(max(forward, backward), both), rng.randint(0, 2 * both)))
    return Durations(forward, inputs, weights, FB=pair, latency=rng.randint(1, 20) if latency else 0)


def simulated(schedule: Schedule, draws: int = DRAWS, seed: int = 0) -> Iterator[Seen]:
    """A schedule with several durations."""
    steps = sequence(schedule)
    rng = random.Random(f"{seed} {schedule.name} {schedule.size} {schedule.microbatches} {schedule.stages}")
    for draw in range(draws):
        durations = drawn(rng, latency=draw % 4 == 3)
        timeline = timed(schedule, steps, durations)
        published, closed = formulas.beside(timeline)
        idle = timeline.idle if published.meaning == formulas.IDLE else timeline.idle_within_span
        every = set(idle) == {published.value}
        yield Seen(
            schedule,
            durations,
            published,
            max(idle) == published.value,
            every,
            closed,
            timeline.idle == closed.idle,
        )


def counted(seen: Seen, counts: Counter[tuple[str, str, bool, bool]]) -> None:
    """Counts (schedule, claim, inside, equal)."""
    name = seen.schedule.name
    claims = {"published": seen.published.applies, "any durations": seen.closed.applies}
    counts[name, "any durations", claims["any durations"], seen.equal] += 1
    if claims["published"]:
        everywhere = formulas.EVERY in seen.published.reason
        counts[name, "published", True, seen.every if everywhere else seen.most] += 1
        if name.startswith("dualpipe"):
            counts[name, "published, on every rank", everywhere, seen.every] += 1
    elif seen.durations.latency == 0:
        counts[name, "published", False, seen.most] += 1


def section() -> tuple[str, bool]:
    counts: Counter[tuple[str, str, bool, bool]] = Counter()
    texts: dict[tuple[str, str], str] = {}
    for schedule in grid():
        for seen in simulated(schedule):
            counted(seen, counts)
            texts[schedule.name, "published"] = f"{seen.published.text} = {seen.published.meaning}"
            texts[schedule.name, "published, on every rank"] = "the same"
            texts[schedule.name, "any durations"] = seen.closed.text
    rows = []
    for name, claim in sorted(
        {key[:2] for key in counts}, key=lambda key: (list(RULES).index(key[0]), key[1])
    ):
        shares = []
        for where in (True, False):
            equal, other = (counts[name, claim, where, same] for same in (True, False))
            shares.append(f"{equal}/{equal + other}")
        rows.append([name, claim, f"`{texts[name, claim]}`", REGIONS[name, claim], *shares])
    table = tabulate(
        rows, ["schedule", "claim", "formula", "where it holds", "inside", "outside"], tablefmt="github"
    )
    text = f"""## Where the formulas hold

`refimpl.pipeline.formulas` beside the simulation, as integers, at P = {", ".join(map(str, RANKS))}, P M
up to {LARGEST}, M from 1 to 5 P where legal, {DRAWS} durations each, half of them on borders of the regions,
a quarter with a latency. F, I, W, B, F&B are durations, B = I + W, L the latency; interleaved with V = 2, 3,
4, its durations are those of a chunk. *Inside*: equal of all where the formula is said to apply (on every
rank, for DualPipe and DualPipeV on the rank that idles the most). *Outside*: equal of all others; for the
published ones without those with a latency, to which none of them applies.

The regions are sufficient; outside of them a formula is true by coincidence (among others where P is 1 or a
duration 0). They were found by simulation and are no proof.

{table}
"""
    return text, not any(count for (_, _, inside, equal), count in counts.items() if inside and not equal)


_DUAL = "F = I >= W and max(F, B) <= F&B <= F + B, any M; or PP = 2"
_DUAL_ANY = "F&B >= max(F, B); L = 0"
REGIONS = {
    ("gpipe", "published"): "L = 0",
    ("gpipe", "any durations"): "everywhere",
    ("1f1b", "published"): "L = 0",
    ("1f1b", "any durations"): "everywhere",
    ("interleaved", "published"): "M >= P; L = 0",
    ("interleaved", "any durations"): "L = 0",
    ("zb1p", "published"): "W <= min(F, I), M >= P; L = 0",
    ("zb1p", "any durations"): "L = 0",
    ("zbv", "published"): "F = I = W, M >= 2P - 1; L = 0",
    ("zbv", "any durations"): "M >= 2P - 1; L = 0",
    ("dualpipe", "published"): f"{_DUAL}; L = 0",
    ("dualpipe", "any durations"): _DUAL_ANY,
    ("dualpipev", "published"): f"{_DUAL}; L = 0",
    ("dualpipev", "any durations"): _DUAL_ANY,
    ("dualpipe", "published, on every rank"): "of those F&B = F + B or P <= 4",
    ("dualpipev", "published, on every rank"): "of those F&B = F + B or P <= 2",
}


def peaks() -> tuple[str, bool]:
    """The table of peaks of live activations, each formula at every legal size."""
    equal: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    texts = {}
    for schedule in grid(tuple(range(1, PEAKS_UP_TO + 1)), 5 * PEAKS_UP_TO**2):
        for release in ("W", "I"):
            for backward_first in (False, True):
                texts[schedule.name], peak = memory.expected(schedule, release, backward_first)
                whole[schedule.name] += 1
                equal[schedule.name] += peak == memory.peak(schedule, release, backward_first)
    rows = []
    for name, text in texts.items():
        example = plan(name, 8, 20)
        found = [
            shortened(memory.peak(example, release, first))
            for release, first in (("W", False), ("I", False), ("W", True))
        ]
        stages, copies = shortened(memory.parameters(example)), max(memory.copies(example))
        rows.append([name, f"`{text}`", f"{equal[name]}/{whole[name]}", *found, stages, copies])
    head = ["schedule", "on rank r", "equal", "8 x 20, at W", "at I", "B before F", "stages held", "copies"]
    text = f"""## Peaks of live activations

In stages of one microbatch, by the order alone; P up to {PEAKS_UP_TO}, M from 1 to 5 P, released at W and at
I, in a pair both held or the old one freed first. For interleaved G is the size of a group. Chunks of
interleaved, zbv and dualpipev are a V-th of what a rank holds. *Stages held* are those whose parameters a
rank holds (the 2x of DualPipe in table 2 of the report), *copies* how many ranks hold the same stage.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}
"""
    return text, equal == whole


def shortened(values: tuple[int, ...]) -> str:
    """One number if all ranks have it."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))
