"""The mixture of experts: gate, routed experts, shared experts.  SPEC MOE-5; report equation 12.

y = experts(x) + shared(x).  The shared experts are one ungated MLP of n_shared_experts times the width.
Gate, routed and shared experts read the same values, each as an operand of its own: a recipe may store them
otherwise.  A balance loss reads the gate's scores, and its gradient joins theirs.
"""

from dataclasses import dataclass, replace

from refimpl.layers import balance, experts, gate, mlp
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    gating: gate.Saved = child("gate")
    balanced: balance.Saved | None = child("gate")
    routed: experts.Saved = child("experts")
    shared: mlp.Saved | None = child("shared_experts")
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, x: Array) -> tuple[Array, Saved]:
    """x (T, D)  ->  (T, D)."""
    idx, weight, gate_saved = c.ops.gate.forward(c.at("gate"), x)
    balanced = None
    if c.balancing is not None:
        _, balanced = c.ops.balance.forward(c.at("gate"), gate_saved.scores, gate_saved.topk_idx)
    dispatched = c.ar.operand("experts.in", x)  # (T, D)
    y, experts_saved = c.ops.experts.forward(c.at("experts"), dispatched, idx, weight)
    shared_saved = None
    if c.config.n_shared_experts:
        hidden = c.ar.operand("shared_experts.in", x)  # (T, D)
        shared, shared_saved = c.ops.mlp.forward(c.at("shared_experts"), hidden)
        y = c.ar.at("moe.out", y + shared)  # (T, D)
    return y, Saved(gate_saved, balanced, experts_saved, shared_saved, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D)."""
    dy = c.joined(dy)
    dx, dweight = c.ops.experts.backward(c.at("experts"), dy, saved.routed, grads)
    if saved.shared is not None:
        dshared = c.ops.mlp.backward(c.at("shared_experts"), dy, saved.shared, grads)
        dx = c.ar.fused("d.moe.in", dx + dshared)  # (T, D)
    inner = c.at("gate")
    if saved.balanced is not None:
        dscores = c.ops.balance.backward(inner, saved.balanced)
        inner = replace(inner, cotangents=c.cotangents.plus(inner.name("scores"), dscores))
    return c.ar.at("d.mlp.in", dx + c.ops.gate.backward(inner, dweight, saved.gating, grads))


INPUTS = ("gate.in", "experts.in", "shared_experts.in")


def again(c: Context, saved: Saved, x: Array) -> Saved:
    """With the operands made of x (T, D) where they were not kept."""
    ar = c.ar.keeping
    gating, routed, shared = saved.gating, saved.routed, saved.shared
    if c.ar.recomputes("gate.in"):
        gating = replace(gating, x=ar.operand("gate.in", x))
    if c.ar.recomputes("experts.in"):
        routed = experts.given(routed, ar.operand("experts.in", x))
    if c.ar.recomputes("shared_experts.in") and shared is not None:
        shared = mlp.given(shared, ar.operand("shared_experts.in", x))
    return replace(saved, gating=gating, routed=routed, shared=shared)
