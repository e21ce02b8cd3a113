"""A network's forward and backward passes through any schedule.  SPEC PIPE-51 to PIPE-59.

Every rank does its entries in its order, on the stages that it holds.  What one needs of another comes as a
message: hidden states forward, their gradients back; a pair starts when it has both of its messages and sends
both of its results when it is done.  I computes the gradient of the input and leaves the operands of weight
gradients waiting; W runs those of its own stage and microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from refimpl.errors import Invalid
from refimpl.model import Model
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.buffers import Buffers, Peak, buffers
from refimpl.pipeline.check import check
from refimpl.pipeline.contributions import Routes, directions, received, routes, summed
from refimpl.pipeline.network import Loss, Network, Stage
from refimpl.pipeline.schedule import Action, Entry, Schedule
from refimpl.pipeline.simulate import Durations, sequence, timed
from refimpl.pipeline.split import Cut, split
from refimpl.pipeline.stages import staged

Order = Iterable[tuple[int, Entry]]  # rank and entry, again and again


@dataclass(frozen=True)
class Execution:
    """What came of it.  Gradients are reduced when they are read."""

    schedule: Schedule
    network: Network
    loss: float
    losses: Mapping[str, float]  # its unweighted parts
    shares: tuple[Loss, ...]  # of each microbatch; they add up to the loss
    peaks: tuple[Peak, ...]  # of each rank: what it held
    sent: tuple[int, ...]  # by each rank to others: bytes of hidden states and their gradients
    ranks: tuple[Rank, ...]

    @property
    def peak(self) -> tuple[int, ...]:
        """Of each rank the most activations that were alive at once, in stages of one microbatch."""
        return tuple(peak.activations for peak in self.peaks)

    @cached_property
    def gradients(self) -> Mapping[str, Array]:
        """Name -> gradient, of the whole network."""
        collected = {key: own for rank in self.ranks for key, own in rank.buffers.contributions.items()}
        return self.network.every(summed(self.network, collected, directions(self.schedule)))

    @cached_property
    def per_rank(self) -> tuple[Mapping[str, Array], ...]:
        """Of each rank name -> gradient, as far as its own stages and microbatches make it."""
        ways = directions(self.schedule)
        return tuple(summed(self.network, rank.buffers.contributions, ways) for rank in self.ranks)


def execute(
    model: Model,
    schedule: Schedule,
    batches: Sequence[Mapping[str, Any]],
    stages: Cut | None = None,
    durations: Durations | None = None,
    release: str = "W",
) -> Execution:
    """The loss of a batch and its gradients, through a schedule.

    batches: of each microbatch the arguments of `Model.forward`.
    stages: how the units are cut, see `split`; as evenly as can be unless given.
    durations: take the entries in the order in which they start; otherwise in one that a list of ranks to
        look at gives.  The result is the same.
    release: when an activation is let go of, "W" or "I".

    Raises: Invalid for an illegal schedule, a split that does not fit, and bad input.
    """
    if not isinstance(schedule, Schedule):
        raise Invalid(f"the schedule is a {type(schedule).__name__}, but it has to be a Schedule.")
    cut = split(model.units, schedule.stages, "more_first" if stages is None else stages)
    return run(staged(model, batches, cut), schedule, durations, release)


def run(
    network: Network,
    schedule: Schedule,
    durations: Durations | None = None,
    release: str = "W",
    order: Order | None = None,
) -> Execution:
    """Any network through a schedule.  order: all entries, each after what it needs.  Raises Invalid."""
    _fit(network, schedule)
    where, ignored = routes(schedule), buffers(network.inputs)
    ranks = tuple(
        Rank({stage: network.stages[stage] for stage in held}, network, Buffers(release, ignored))
        for held in schedule.placement
    )
    for number, entry in in_order(schedule, durations) if order is None else order:
        for letter in ranks[number].do(entry):
            _deliver(letter, number, ranks, where)
    terms = [
        [ranks[where[Action("F", s, m)]].terms[s, m] for s in range(schedule.stages)]
        for m in range(schedule.microbatches)
    ]
    whole = network.loss(terms)
    shares = tuple(network.loss([of_stages]) for of_stages in terms)
    peaks, sent = tuple(rank.buffers.peak for rank in ranks), tuple(rank.sent for rank in ranks)
    return Execution(schedule, network, whole.value, whole.parts, shares, peaks, sent, ranks)


def in_order(schedule: Schedule, durations: Durations | None = None) -> list[tuple[int, Entry]]:
    """All entries, each after what it needs: as they start, or in the order of `sequence`."""
    steps = sequence(schedule)
    if durations is None:
        return [(step.rank, step.entry) for step in steps]
    times, position, found = timed(schedule, steps, durations), [0] * schedule.size, []
    for place, (rank, entry, _) in enumerate(steps):
        found.append((times.start[rank][position[rank]], place, rank, entry))
        position[rank] += 1
    return [(rank, entry) for _, _, rank, entry in sorted(found, key=lambda one: one[:2])]


class Rank:
    """One rank: its stages, its post, what it holds, and what its stages added to the loss."""

    def __init__(self, stages: Mapping[int, Stage], network: Network, buffers: Buffers) -> None:
        self.buffers, self.sent = buffers, 0
        self.post: dict[Action, Array] = {}  # what has come -> for which action
        self.terms: dict[tuple[int, int], Any] = {}
        self._stages, self._network = stages, network

    def do(self, entry: Entry) -> list[tuple[Action, Array]]:
        """An entry; what it sends and to which actions."""
        inputs = [self._taken(action) for action in entry.parts]
        made = [self._done(action, x) for action, x in zip(entry.parts, inputs, strict=True)]
        return [letter for letter in made if letter is not None]

    def _taken(self, action: Action) -> Array | None:
        first = 0 if action.kind == "F" else len(self._network.stages) - 1
        if action.kind == "W" or action.stage == first:
            return None
        return self.post.pop(received(action))

    def _done(self, action: Action, x: Array | None) -> tuple[Action, Array] | None:
        kind, stage, microbatch = action
        key, own = (stage, microbatch), self._stages[stage]
        if kind == "F":
            x, saved, self.terms[key] = own.forward(microbatch, x)
            self.buffers.keep(key, saved)
        elif kind in ("B", "I"):
            grads = self._network.gradients(deferred=True)
            x = own.backward(microbatch, x, self.buffers.saved(key), grads)
            self.buffers.wait(key, grads)
        if kind in ("B", "W"):
            self.buffers.run(key)
        if kind == "W":
            return None
        beyond = stage + 1 if kind == "F" else stage - 1
        if not 0 <= beyond < len(self._network.stages):
            return None
        assert x is not None  # only the ends of the network give nothing
        return Action("F" if kind == "F" else "I", beyond, microbatch), x


def _deliver(letter: tuple[Action, Array], sender: int, ranks: Sequence[Rank], where: Routes) -> None:
    action, x = letter
    ranks[where[action]].post[action] = x
    ranks[sender].sent += x.nbytes if where[action] != sender else 0


def _fit(network: Network, schedule: Schedule) -> None:
    """The schedule is legal, and is one of this network and these microbatches.  Raises Invalid."""
    found = check(schedule)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise Invalid(f"the schedule is not legal: {found[0].text.removesuffix('.')}{more}.")
    if len(network.stages) != schedule.stages:
        raise Invalid(
            f"the network has {len(network.stages)} stages, but the schedule is for {schedule.stages}."
        )
    if network.microbatches != schedule.microbatches:
        raise Invalid(
            f"there are {network.microbatches} microbatches, but the schedule is for {schedule.microbatches}."
        )
