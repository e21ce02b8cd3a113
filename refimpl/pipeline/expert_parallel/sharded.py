"""The routed experts over ranks: each computes only its own on the tokens that it received.  SPEC XPAR-11.

dispatch    the operand's rows go to the ranks, each token once per rank, as codes where it is quantised
compute     a rank gathers the rows of its experts from what it received; it has no other weights
combine     outputs return to their slots and are weighted and summed on the token's rank

Backward: dy goes the way of the tokens and dx that of the results.  An expert sees the rows that it sees in
one place, in the order (source rank, token).  Where source ranks hold runs of tokens that is the order of
tokens, and everything equals the unsharded layer bit for bit in every arithmetic.  Where tokens live in any
other way it still does, if their order does not matter (on BLAS and to FP8 tiles along tokens it does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from refimpl.layers import experts, mlp
from refimpl.layers.context import Context, Op, Ops, Parameters, tensor
from refimpl.numerics.arithmetic import Array, Kept, Operand, Weight
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline.expert_parallel.combine import BY_SLOTS, Combine
from refimpl.pipeline.expert_parallel.dispatch import Dispatch, check_nodes, dispatch
from refimpl.pipeline.expert_parallel.permutation import received
from refimpl.pipeline.expert_parallel.placement import Placement, check_experts


@dataclass(frozen=True)
class Saved:
    """As experts.Saved, with the way that the tokens went."""

    plan: Dispatch
    groups: list[experts.Group]  # by rank, then local expert; experts without tokens have none
    experts: list[mlp.Saved]  # in the order of `groups`
    weight: Array  # (T, K)
    slots: Kept = tensor("slots")  # (T, K, D)  each expert's output, before its weight
    out: Array | None = tensor("")  # (T, D)


def sharded(
    ops: Ops,
    placement: Placement,
    source: Callable[[int], Array] | None = None,
    combine: Combine = BY_SLOTS,
    most_nodes: int | None = None,
) -> Ops:
    """The operations with the routed experts over the placement's ranks.

    source: T -> (T,) the rank that holds each token; without it, ranks hold runs of tokens.
    most_nodes: refuse a token of more nodes than these.
    Raises, when run: Invalid where the placement is not of this model's experts.
    """

    def forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, Saved]:
        """x (T, D), idx (T, K) int, weight (T, K)  ->  (T, D)."""
        ar, (tokens, chosen) = c.ar, idx.shape
        check_experts(c.config, placement)
        plan = dispatch(idx, placement, None if source is None else source(tokens))
        if most_nodes is not None:
            check_nodes(plan, most_nodes)
        slots = ar.zeros((tokens * chosen, x.shape[-1]))  # (T K, D)

        def run(task: _Task) -> mlp.Saved:
            slots[task.group.slots], saved = c.ops.mlp.forward(task.context, task.x)
            out: mlp.Saved = saved
            return out

        tasks = [task for rank in range(placement.ranks) for task in _tasks(c, plan, rank, x)]
        done = ar.each(run, tasks)
        slots = slots.reshape(tokens, chosen, -1)  # (T, K, D)
        y = combine.forward(ar, plan, slots, weight)  # (T, D)
        groups = [task.group for task in tasks]
        return y, Saved(plan, groups, done, weight, ar.keep("experts.slots", slots), c.probe(y))

    def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> tuple[Array, Array]:
        """dy (T, D)  ->  dx (T, D), dweight (T, K)."""
        ar, slots = c.ar, saved.slots.value()  # (T, K, D)
        tokens, chosen, width = slots.shape
        dy = c.joined(dy)
        dweight = ar.matmul(dy[:, None, :], slots)[:, 0]  # (T, K)
        flat = saved.weight.reshape(-1)  # (T K,)
        dslots = ar.zeros((tokens * chosen, width))  # (T K, D)

        def run(work: tuple[experts.Group, mlp.Saved]) -> Gradients:
            group, expert = work
            own, rank = grads.branch(), int(placement.rank[group.expert])
            dout = ar.at("d.experts.slots", flat[group.slots][:, None] * dy[group.tokens])  # (n, D)
            at = _on_rank(c, placement, rank).at(str(group.expert))
            dslots[group.slots] = c.ops.mlp.backward(at, dout, expert, own)
            return own

        for own in ar.each(run, zip(saved.groups, saved.experts, strict=True)):
            grads.merge(own)
        return combine.backward(ar, saved.plan, dslots.reshape(slots.shape)), dweight  # (T, D), (T, K)

    return replace(ops, experts=Op(forward, backward))


@dataclass(frozen=True)
class _Task:
    """One expert's work on its rank."""

    context: Context
    group: experts.Group
    x: Operand  # (n, D)


def _tasks(c: Context, plan: Dispatch, rank: int, x: Operand) -> list[_Task]:
    """What a rank has to do: the rows of each of its experts, gathered from the tokens that it received."""
    came, inner = received(plan, rank), _on_rank(c, plan.placement, rank)
    here = x.rows(came.tokens)  # (n, D)  what the dispatch brings
    tasks = []
    for local, expert in enumerate(plan.placement.held[rank]):
        place, k = (came.experts == local).nonzero()  # in the order of permutation.computed
        if len(place):
            group = experts.Group(expert, came.tokens[place], came.slots[place, k])
            tasks.append(_Task(inner.at(str(expert)), group, here.rows(place)))
    return tasks


def _on_rank(c: Context, placement: Placement, rank: int) -> Context:
    own = tuple(c.at(str(expert)).path + "." for expert in placement.held[rank])
    return replace(c, parameters=_Shard(c.parameters, own))


@dataclass(frozen=True)
class _Shard:
    """The weights of a rank's own experts."""

    whole: Parameters
    own: tuple[str, ...]  # beginnings of their names

    def array(self, name: str) -> Array:
        assert name.startswith(self.own), name
        return self.whole.array(name)

    def weight(self, name: str) -> Weight:
        assert name.startswith(self.own), name
        return self.whole.weight(name)
