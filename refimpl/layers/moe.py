"""The mixture of experts: gate, routed experts, shared experts.  SPEC MOE-5; report equation 12.

y = experts(x) + shared(x).  The shared experts are one ungated MLP of n_shared_experts times the width.
Routed and shared experts read the same operand.  A balance loss reads the gate's scores, and its gradient
joins theirs.
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
    hidden = c.ar.operand("mlp.in", x)  # (T, D)
    y, experts_saved = c.ops.experts.forward(c.at("experts"), hidden, idx, weight)
    shared_saved = None
    if c.config.n_shared_experts:
        shared, shared_saved = c.ops.mlp.forward(c.at("shared_experts"), hidden)
        y = c.ar.at("moe.out", y + shared)  # (T, D)
    return y, Saved(gate_saved, balanced, experts_saved, shared_saved, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D)."""
    dy = c.joined(dy)
    dx, dweight = c.ops.experts.backward(c.at("experts"), dy, saved.routed, grads)
    if saved.shared is not None:
        dx = dx + c.ops.mlp.backward(c.at("shared_experts"), dy, saved.shared, grads)
    inner = c.at("gate")
    if saved.balanced is not None:
        dscores = c.ops.balance.backward(inner, saved.balanced)
        inner = replace(inner, cotangents=c.cotangents.plus(inner.name("scores"), dscores))
    return c.ar.at("d.mlp.in", dx + c.ops.gate.backward(inner, dweight, saved.gating, grads))
