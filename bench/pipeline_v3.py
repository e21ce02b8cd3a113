"""DeepSeek-V3's own setting: the simulation beside the published figures of a step."""

from dataclasses import replace
from typing import NamedTuple

from tabulate import tabulate

from refimpl.pipeline import formulas
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Pair, Schedule
from refimpl.pipeline.simulate import Durations, sequence, simulate, timed

# Insights into DeepSeek-V3, table 4, in seconds of one step on 2,048 GPUs (the column of MPFT).
STEP, FORWARD, BUBBLE, BACKWARD, WEIGHTS, PAIRS, OPTIMISER = 19.926, 1.13, 2.06, 1.99, 0.48, 13.95, 0.29
RANKS, GPUS, SEQUENCES = 16, 2048, 15360  # report, sections 3.2 and 4.2
MICRO = 1_000_000  # durations are whole microseconds
HOP = round(4096 * 7168 * 2 / 50e9 * MICRO)  # a microbatch of one sequence over one NIC of 400 Gb/s


class Reading(NamedTuple):
    """How the published sums are shared out over actions."""

    sequences: int  # of a microbatch: not published
    rank: str  # whose actions the sums are of: not published
    weights: str  # what 1W counts: not published


READINGS = (
    Reading(1, "0", "deferred"),
    Reading(1, "mean", "deferred"),
    Reading(1, "0", "unpaired"),
    Reading(2, "0", "deferred"),
    Reading(3, "0", "deferred"),
)


def counts(schedule: Schedule, rank: str) -> dict[str, float]:
    """How many F, B, I, W and FB a rank has, or a rank in the mean."""
    chosen = schedule.ranks if rank == "mean" else (schedule.ranks[int(rank)],)
    kinds = [entry.kind for own in chosen for entry in own]
    return {kind: kinds.count(kind) / len(chosen) for kind in ("F", "B", "I", "W", "FB")}


def fitted(schedule: Schedule, reading: Reading) -> Durations:
    """The durations with which the actions of the rank add up to the published sums."""
    n = counts(schedule, reading.rank)
    if reading.weights == "deferred":  # 1W is what was put off, 1B holds I and whole backwards
        weight = WEIGHTS / n["W"]
        inputs = (BACKWARD - n["B"] * weight) / (n["I"] + n["B"])
    else:  # 1B and 1W are all input and all weight gradients outside of pairs
        weight = WEIGHTS / (n["W"] + n["B"])
        inputs = BACKWARD / (n["I"] + n["B"])
    times = (FORWARD / n["F"], inputs, weight, PAIRS / n["FB"])
    forward, inputs, weight, pair = (round(MICRO * seconds) for seconds in times)
    return Durations(forward, inputs, weight, FB=pair)


def latency_for(schedule: Schedule, times: Durations, idle: int) -> int:
    """The smallest latency with which the rank in the mean idles at least that long, by halving."""
    steps = sequence(schedule)
    low, high = 0, MICRO
    while low < high:
        middle = (low + high) // 2
        if sum(timed(schedule, steps, replace(times, latency=middle)).idle) >= idle * schedule.size:
            high = middle
        else:
            low = middle + 1
    return low


def section() -> tuple[str, bool]:
    rows, latencies, idles, agrees = [], [], [], True
    for reading in READINGS:
        microbatches = SEQUENCES // (GPUS // RANKS) // reading.sequences
        schedule = plan("dualpipe", RANKS, microbatches)
        times = fitted(schedule, reading)
        timeline = simulate(schedule, times)
        published, closed = formulas.beside(timeline)
        mean = sum(timeline.idle) / RANKS
        rows.append(
            [
                reading.sequences,
                microbatches,
                reading.rank,
                reading.weights,
                *(
                    f"{value / 1000:.1f}"
                    for value in (times.F, times.I, times.W, times.F + times.B, times.FB)
                ),
                f"{min(timeline.idle) / MICRO:.2f} to {max(timeline.idle) / MICRO:.2f}",
                f"{mean / timeline.makespan:.1%}",
                f"{published.value / MICRO:.2f}{'' if published.applies else ' *'}",
                f"{timeline.makespan / MICRO + OPTIMISER:.2f}",
            ]
        )
        if reading.sequences == 1:
            late = latency_for(schedule, times, round(BUBBLE * MICRO))
            latencies.append(f"{late / 1000:.1f} ms ({reading.rank}, {reading.weights})")
            idles += timeline.idle
        agrees &= not closed.applies or closed.idle == timeline.idle
    head = ["sequences", "M", "rank", "1W is", "F", "I", "W", "F + B", "F&B", "idle", "share"]
    head += ["formula", "step"]
    least, most = min(idles) / MICRO, max(idles) / MICRO
    schedule = plan("dualpipe", RANKS, 120)
    sent = simulate(schedule, replace(fitted(schedule, READINGS[0]), latency=HOP))
    hop = sum(sent.idle) / RANKS / MICRO
    pairs = sum(isinstance(entry, Pair) for entry in schedule.ranks[0])
    text = f"""## DeepSeek-V3's own setting

Published for a step of 2,048 H800 (Insights into DeepSeek-V3, table 4): {STEP} s, of which 1F {FORWARD},
1B {BACKWARD}, 1W {WEIGHTS}, 1F1B {PAIRS}, optimiser {OPTIMISER} and bubble {BUBBLE} s ({BUBBLE / STEP:.1%}).
Below is DualPipe on {RANKS} ranks with the durations that follow from these sums: F to F&B in milliseconds,
idle (from the rank that idles the least to the one that idles the most), formula and step in seconds.

What is known: 16 ranks of pipeline, {SEQUENCES:,} sequences of 4,096 tokens in a step, so
{GPUS // RANKS} pipelines of {SEQUENCES // (GPUS // RANKS)} sequences. What is not, and is assumed here:
the sequences of a microbatch (1, 2 or 3 leave enough microbatches for DualPipe, M >= 32 and even), of which
rank the sums are (rank 0, or a rank in the mean), whether 1W counts only deferred weight gradients or all
outside of pairs, that all stages take the same time, and that sends take none.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}

\\* the published formula does not apply to these durations (F and I differ).

- With one sequence a microbatch a pair ({pairs} of them on rank 0) takes less than F and B one after the
  other, as an overlapped pair should; with two or three it would take far longer than both. So M = 120 is
  the only setting of the three in which the published sums make sense.
- There the order alone explains a third to three fifths of the published bubble: a rank idles for
  {least:.2f} to {most:.2f} s, and the step is shorter than the published one by the rest. What else is in
  the {BUBBLE} s is not published; unequal stages (61 layers on 16 ranks, embedding and head), sends and
  experts of unequal load are left out here.
- A send of {HOP / 1000:.1f} ms (4,096 tokens of 7,168 in bf16 at 50 GB/s, nothing hidden) makes the
  mean idle {hop:.2f} s in the first row. To make it {BUBBLE} s by sends alone, each would have to take
  {" or ".join(latencies)}.
"""
    return text, agrees
