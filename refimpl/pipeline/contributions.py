"""The gradients of a pipeline, from what its ranks collected.  SPEC PIPE-58, PIPE-59.

Each stage and microbatch has a collector of its own, and the sum over them does not depend on when or where
they were filled: microbatches in their order, of one microbatch the stages from the last to the first, as in
an unpipelined backward pass.  In an order-free arithmetic all of it is one contraction.  In the others, where
a stage is on several ranks, each direction (the microbatches that take the same ranks) is summed by itself,
and then the directions, in the order of their first microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline.network import Network
from refimpl.pipeline.schedule import Action, Schedule

Routes = Mapping[Action, int]  # F and I of a stage and microbatch -> the rank that does it


def received(action: Action) -> Action:
    """A whole backward takes and makes the same gradient of hidden states as I."""
    return action._replace(kind="I") if action.kind == "B" else action


def routes(schedule: Schedule) -> Routes:
    """Where hidden states and their gradients go."""
    return {received(action): rank for rank, _, action in schedule.actions()}


def directions(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """The microbatches that take the same ranks; one direction unless a stage is on several ranks."""
    where, found = routes(schedule), dict[tuple[int, ...], list[int]]()
    for microbatch in range(schedule.microbatches):
        path = tuple(where[Action("F", stage, microbatch)] for stage in range(schedule.stages))
        found.setdefault(path, []).append(microbatch)
    return tuple(map(tuple, found.values()))


def summed(
    network: Network, collected: Mapping[tuple[int, int], Gradients], ways: Sequence[Sequence[int]]
) -> dict[str, Array]:
    """collected[stage, microbatch]  ->  name -> gradient; `ways` are the directions."""
    if network.gradients().ar.order_free:
        ways = [sorted(microbatch for way in ways for microbatch in way)]
    of_ways = []
    for way in ways:
        total = network.gradients()
        for microbatch in way:
            for stage in reversed(range(len(network.stages))):
                if (stage, microbatch) in collected:
                    total.merge(collected[stage, microbatch])
        of_ways.append(total.reduce())
    if len(of_ways) == 1:
        return of_ways[0]
    both = network.gradients()
    for number, of_way in enumerate(of_ways):
        for name, gradient in of_way.items():
            both.add(name, number, gradient)
    return both.reduce()
