"""The inside of an overlapped pair: how much of the all-to-all is hidden.  SPEC PIPE-33 to PIPE-37.

A chunk of n blocks goes forward while another of n blocks goes backward.  Their parts run on two lanes, each
in its order, a part as soon as its lane is free and what it needs is there.  For each block, in the order of
the report's figure 4 (PP once, after the last block):

    compute        MLP(B)  MLP(W)  MLP(F)  ATTN(B)  ATTN(W)  ATTN(F)
    communication  DISPATCH(F)  DISPATCH(B)  COMBINE(F)  PP  COMBINE(B)

    forward    ATTN(F) -> DISPATCH(F) -> MLP(F) -> COMBINE(F) -> the next block, after the last one PP
    backward   COMBINE(B) -> MLP(B) -> DISPATCH(B) -> ATTN(B) -> the block before, after the first one PP
               MLP(B) -> MLP(W),  ATTN(B) -> ATTN(W)

In the figure the boundaries of the blocks are not aligned: ATTN(F) and COMBINE(B) at the end belong to the
blocks that come next, after the last row to the next pair, whose inputs PP has brought.  `aligned` puts them
first instead, so that a pair has exactly the parts of its own two chunks: that is the pair of `simulate`.

Not modelled: barriers, launches, the shared expert on its own, and loads of experts that differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import gcd
from typing import NamedTuple

from refimpl.errors import Invalid
from refimpl.pipeline.simulate import Durations, whole

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True)
class Parts:
    """What the parts of a block take alone, compute on all SMs, in whole units; a pair has one PP.

    Backward, dispatch(B) brings back the gradients of what dispatch(F) sent out, and combine(B) sends out
    those of what combine(F) brought back.
    """

    attention_forward: int
    attention_input: int
    attention_weight: int
    mlp_forward: int
    mlp_input: int
    mlp_weight: int
    dispatch_forward: int
    combine_forward: int
    dispatch_backward: int
    combine_backward: int
    pp: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(f"the duration {field.name}", getattr(self, field.name))


@dataclass(frozen=True)
class SMs:
    """Who has the streaming multiprocessors while a pair runs; V3 gives 20 of 132 to communication.

    Compute slows to (total - communication) / total of its speed.  Communication has its full speed from
    `saturating` of them on and below that its share of it; 0 if it needs none.  This is a model: linear, and
    no other resource is shared.
    """

    total: int = 132
    communication: int = 20
    saturating: int = 20

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(f"the number of SMs, {field.name},", getattr(self, field.name))
        if not min(1, self.saturating) <= self.communication < self.total:
            raise Invalid(
                f"communication has {self.communication} of {self.total} SMs, but needs one at least (unless "
                f"none saturate it), and has to leave one to compute."
            )

    @property
    def unit(self) -> int:
        """How many ticks make all scaled durations whole."""
        return (self.total - self.communication) * max(1, self.communication)

    def ticks(self, lane: str, duration: int) -> int:
        """What a part takes in a pair; alone it takes duration * unit."""
        if lane == COMPUTE:
            return duration * self.total * max(1, self.communication)
        return duration * (self.total - self.communication) * max(1, self.communication, self.saturating)


class Part(NamedTuple):
    """A part of the forward or backward chunk on its lane; needs are places in the list of parts."""

    name: str
    block: int
    lane: str
    duration: int
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Overlapped:
    """A pair with its times; `ticks` of them are one unit of the given durations."""

    parts: tuple[Part, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    ticks: int

    @property
    def makespan(self) -> int:
        return max(self.end)

    @cached_property
    def compute(self) -> int:
        """The time in which the compute lane is busy."""
        return sum(part.duration for part in self.parts if part.lane == COMPUTE)

    @cached_property
    def communication(self) -> int:
        """The time in which the communication lane is busy."""
        return sum(part.duration for part in self.parts if part.lane == COMMUNICATION)

    @cached_property
    def hidden(self) -> int:
        """Communication that happens while something is computed."""
        both, computing, sending = 0, self._of(COMPUTE), self._of(COMMUNICATION)
        i = j = 0
        while i < len(computing) and j < len(sending):
            begin, end = max(computing[i][0], sending[j][0]), min(computing[i][1], sending[j][1])
            both += max(0, end - begin)
            if computing[i][1] <= sending[j][1]:
                i += 1
            else:
                j += 1
        return both

    @property
    def exposed(self) -> int:
        """Communication during which nothing is computed."""
        return self.communication - self.hidden

    def _of(self, lane: str) -> list[tuple[int, int]]:
        times = zip(self.parts, self.start, self.end, strict=True)
        return [(start, end) for part, start, end in times if part.lane == lane]


def overlapped(parts: Parts, sms: SMs | None = None, blocks: int = 1, aligned: bool = False) -> Overlapped:
    """A forward chunk of `blocks` blocks and a backward one on two lanes, as figure 4 or aligned."""
    sms = sms or SMs()
    placed = _laid_out(parts, sms, _number(blocks), aligned)
    free = {COMPUTE: 0, COMMUNICATION: 0}
    start: list[int] = []
    end: list[int] = []
    for part in placed:
        start.append(max(free[part.lane], *(end[place] for place in part.needs), 0))
        end.append(start[-1] + part.duration)
        free[part.lane] = end[-1]
    shared = gcd(sms.unit, *(part.duration for part in placed)) or 1
    return Overlapped(
        tuple(part._replace(duration=part.duration // shared) for part in placed),
        tuple(time // shared for time in start),
        tuple(time // shared for time in end),
        sms.unit // shared,
    )


def durations(
    parts: Parts, sms: SMs | None = None, blocks: int = 1, latency: int = 0, scale: Sequence[int] = ()
) -> tuple[Durations, int]:
    """F, I, W, B and FB of a chunk for `simulate`, and how many of their ticks are one unit of `parts`.

    Alone a chunk has all SMs and nothing overlaps: F, I and W are the sums of their parts without PP, B is
    I + W.  FB is the makespan of the aligned pair with its PP, so that a latency comes on top of that.
    """
    sms = sms or SMs()
    p, n, unit = parts, _number(blocks), sms.unit
    pair = overlapped(parts, sms, blocks, aligned=True)
    alone = (
        n * unit * (p.attention_forward + p.dispatch_forward + p.mlp_forward + p.combine_forward),
        n * unit * (p.combine_backward + p.mlp_input + p.dispatch_backward + p.attention_input),
        n * unit * (p.mlp_weight + p.attention_weight),
    )
    times = (*alone, pair.makespan * (unit // pair.ticks))
    late = whole("the latency", latency) * unit
    shared = gcd(unit, late, *times)
    forward, backward, weight, both = (time // shared for time in times)
    return (
        Durations(forward, backward, weight, FB=both, latency=late // shared, scale=scale),
        unit // shared,
    )


def _number(blocks: int) -> int:
    if whole("the number of blocks", blocks) == 0:
        raise Invalid("a chunk has 0 blocks, but at least one is required.")
    return blocks


def _laid_out(parts: Parts, sms: SMs, blocks: int, aligned: bool) -> list[Part]:
    """All parts, each behind what it needs, and those of a lane in the order of the lane.

    Block b of the forward chunk is beside block n - 1 - b of the backward chunk; both are called b here.
    """
    placed: list[Part] = []
    there: dict[tuple[str, int], int] = {}

    def put(name: str, block: int, lane: str, duration: int, *needs: tuple[str, int]) -> None:
        there[name, block] = len(placed)
        # What is not there was done before the pair began.
        known = tuple(there[need] for need in needs if need in there)
        placed.append(Part(name, block, lane, sms.ticks(lane, duration), known))

    def enter(block: int, forward: tuple[str, int], backward: tuple[str, int]) -> None:
        put("ATTN(F)", block, COMPUTE, parts.attention_forward, forward)
        put("COMBINE(B)", block, COMMUNICATION, parts.combine_backward, backward)

    if aligned:
        enter(0, ("PP", -1), ("PP", -1))
    for b in range(blocks):
        put("DISPATCH(F)", b, COMMUNICATION, parts.dispatch_forward, ("ATTN(F)", b))
        put("MLP(B)", b, COMPUTE, parts.mlp_input, ("COMBINE(B)", b))
        put("MLP(W)", b, COMPUTE, parts.mlp_weight, ("MLP(B)", b))
        put("DISPATCH(B)", b, COMMUNICATION, parts.dispatch_backward, ("MLP(B)", b))
        put("MLP(F)", b, COMPUTE, parts.mlp_forward, ("DISPATCH(F)", b))
        put("COMBINE(F)", b, COMMUNICATION, parts.combine_forward, ("MLP(F)", b))
        put("ATTN(B)", b, COMPUTE, parts.attention_input, ("DISPATCH(B)", b))
        put("ATTN(W)", b, COMPUTE, parts.attention_weight, ("ATTN(B)", b))
        if b < blocks - 1:
            enter(b + 1, ("COMBINE(F)", b), ("ATTN(B)", b))
            continue
        put("PP", b, COMMUNICATION, parts.pp, ("COMBINE(F)", b), ("ATTN(B)", b))
        if not aligned:
            enter(blocks, ("PP", b), ("PP", b))
    return placed
