"""SwiGLU: a dense MLP, one routed expert, or the shared experts.  SPEC MLP-1, MLP-2.

y = down(silu(gate x) * up x), silu(g) = g sigmoid(g).
Backward: dup = da silu(g), dgate = da up (s + g s (1 - s)) with s = sigmoid(g).
"""

from dataclasses import dataclass, replace

from refimpl.layers import linear
from refimpl.layers.context import Context, child, tensor
from refimpl.numerics.arithmetic import Array, Kept, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    gate: Kept  # (T, I)
    up: Kept  # (T, I)
    gate_proj: linear.Saved = child("gate_proj")
    up_proj: linear.Saved = child("up_proj")
    act: Array | None = tensor("act")  # (T, I)
    down_proj: linear.Saved = child("down_proj")
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, x: Operand) -> tuple[Array, Saved]:
    """x (T, D)  ->  (T, D)."""
    ar, linear_forward = c.ar, c.ops.linear.forward
    gate, gate_saved = linear_forward(c.at("gate_proj"), x)  # (T, I)
    up, up_saved = linear_forward(c.at("up_proj"), x)  # (T, I)
    act = _act(c, gate, up)  # (T, I)
    y, down_saved = linear_forward(c.at("down_proj"), ar.operand(c.site("down_proj.in"), act))
    kept = (ar.keep(c.site("swiglu.gate"), gate), ar.keep(c.site("swiglu.up"), up))
    return y, Saved(*kept, gate_saved, up_saved, c.probe(act), down_saved, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, D)  ->  dx (T, D)."""
    saved = again(c, saved)
    ar, linear_backward = c.ar, c.ops.linear.backward
    dact = c.joined(linear_backward(c.at("down_proj"), c.joined(dy), saved.down_proj, grads), "act")  # (T, I)
    gate, up = saved.gate.value(), saved.up.value()
    s = ar.sigmoid(gate)  # (T, I)
    silu = gate * s
    dup = dact * ar.fused(c.site("swiglu.silu"), silu)
    dsilu = ar.fused(f"d.{c.site('swiglu.silu')}", dact * up)  # (T, I)
    dgate = dsilu * (s + silu * (1.0 - s))
    dx = linear_backward(c.at("gate_proj"), dgate, saved.gate_proj, grads)
    return ar.at("d.mlp.in", dx + linear_backward(c.at("up_proj"), dup, saved.up_proj, grads))


def again(c: Context, saved: Saved) -> Saved:
    """With the output of SwiGLU computed again from its inputs as they were kept, if it was not kept."""
    site = c.site("down_proj.in")
    if not c.ar.recomputes(site):
        return saved
    act = _act(c, saved.gate.value(), saved.up.value())
    return replace(saved, down_proj=linear.again(saved.down_proj, c.ar.keeping.operand(site, act)))


def given(saved: Saved, x: Operand) -> Saved:
    """With the MLP's own input x (T, D), if it was not kept."""
    gate_proj, up_proj = linear.again(saved.gate_proj, x), linear.again(saved.up_proj, x)
    return replace(saved, gate_proj=gate_proj, up_proj=up_proj)


def _act(c: Context, gate: Array, up: Array) -> Array:
    """SwiGLU of its inputs (T, I)."""
    silu = c.ar.fused(c.site("swiglu.silu"), gate * c.ar.sigmoid(gate))
    return c.ar.at(c.site("swiglu.act"), silu * up)
