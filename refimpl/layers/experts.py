"""The routed experts: gather, compute, combine.  SPEC MOE-1 to MOE-4.

y[t] = sum_k weight[t, k] E_{idx[t, k]}(x[t]).  Each expert computes all its tokens at once and writes to its
slots (T, K, D), so the result depends neither on the order of experts nor on where they run.
Backward: dweight[t, k] = <dy[t], E_{idx[t, k]}(x[t])>;  expert k receives weight[t, k] dy[t].
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.layers import mlp
from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Arithmetic, Array, Kept, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Group:
    """One expert's work: its number, its tokens, and its places in the (T * K) slots."""

    expert: int
    tokens: Array  # (n,)
    slots: Array  # (n,)


@dataclass(frozen=True)
class Saved:
    groups: list[Group]
    experts: list[mlp.Saved]  # in the order of `groups`
    weight: Array  # (T, K)
    slots: Kept = tensor("slots")  # (T, K, D)  each expert's output, before its weight
    out: Array | None = tensor("")  # (T, D)
    order: Array | None = None  # (T, K)  a token's slots by number of expert, where gradients add up so


def forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, Saved]:
    """x (T, D), idx (T, K) int, weight (T, K)  ->  (T, D)."""
    ar, groups = c.ar, group_tokens(idx)
    tokens, chosen = idx.shape

    slots = ar.zeros((tokens * chosen, x.shape[-1]))  # (T K, D)

    def run(group: Group) -> mlp.Saved:
        slots[group.slots], saved = c.ops.mlp.forward(_expert(c, group), x.rows(group.tokens))
        out: mlp.Saved = saved
        return out

    done = ar.each(run, groups)
    slots = slots.reshape(tokens, chosen, -1)  # (T, K, D)
    y = ar.at("experts.out", combined(ar, weight, slots, idx))  # (T, D)
    order = by_expert(idx) if ar.stores("d.experts.sum") else None
    return y, Saved(groups, done, weight, c.keep("experts.slots", slots), c.probe(y), order)


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> tuple[Array, Array]:
    """dy (T, D)  ->  dx (T, D), dweight (T, K)."""
    ar, slots = c.ar, saved.slots.value()  # (T, K, D)
    tokens, chosen, width = slots.shape
    dy = c.joined(dy)
    dweight = ar.matmul(dy[:, None, :], slots)[:, 0]  # (T, K)
    flat = saved.weight.reshape(-1)  # (T K,)

    dslots = ar.zeros((tokens * chosen, width))  # (T K, D)

    def run(work: tuple[Group, mlp.Saved]) -> Gradients:
        group, expert = work
        own = grads.branch()
        dout = ar.at("d.experts.slots", flat[group.slots][:, None] * dy[group.tokens])  # (n, D)
        dslots[group.slots] = c.ops.mlp.backward(_expert(c, group), dout, expert, own)
        return own

    for own in ar.each(run, zip(saved.groups, saved.experts, strict=True)):
        grads.merge(own)
    dx = added(ar, "d.experts.sum", dslots.reshape(slots.shape), saved.order)
    return ar.at("d.experts.in", dx), dweight  # (T, D), (T, K)


def given(saved: Saved, x: Operand) -> Saved:
    """With the experts' inputs, rows of x (T, D), where they were not kept."""
    pairs = zip(saved.groups, saved.experts, strict=True)
    return replace(saved, experts=[mlp.given(own, x.rows(group.tokens)) for group, own in pairs])


def combined(ar: Arithmetic, weight: Array, slots: Array, idx: Array) -> Array:
    """weight (T, K), slots (T, K, D)  ->  (T, D): one contraction, unless the recipe stores its steps."""
    if not ar.stores("experts.slot") and not ar.stores("experts.sum"):
        return ar.matmul(weight[:, None, :], slots.swapaxes(1, 2))[:, 0]
    weighted = ar.fused("experts.slot", slots * weight[..., None])  # (T, K, D)
    return added(ar, "experts.sum", weighted, by_expert(idx))


def added(ar: Arithmetic, site: str, slots: Array, order: Array | None) -> Array:
    """slots (T, K, D)  ->  (T, D): summed over K, or one by one in an order (T, K)."""
    if order is None or not ar.stores(site):
        return ar.sum(slots, 1)
    ordered = np.take_along_axis(slots, order[..., None], 1)
    total = ordered[:, 0]
    for k in range(1, ordered.shape[1]):
        total = ar.fused(site, total + ordered[:, k])
    return total


def by_expert(idx: Array) -> Array:
    """idx (T, K)  ->  (T, K): a token's slots in the order of their experts' numbers."""
    return np.argsort(idx, axis=1, kind="stable")


def group_tokens(idx: Array) -> list[Group]:
    """idx (T, K)  ->  the experts that have tokens, by number, each with its tokens in their order."""
    flat = idx.reshape(-1)
    order = np.argsort(flat, kind="stable")  # (T K,)
    experts, starts = np.unique(flat[order], return_index=True)
    parts = np.split(order, starts[1:])
    return [Group(int(e), part // idx.shape[1], part) for e, part in zip(experts, parts, strict=True)]


def _expert(c: Context, group: Group) -> Context:
    return c.at(str(group.expert))
