"""SwiGLU, experts and their sum computed in other ways.  SPEC MLP-1, MLP-2, MOE-1 to MOE-5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.layers import experts, mlp, moe
from refimpl.layers.context import Context, Op, Ops, tensor
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.gradients import Gradients
from refimpl.variants.variation import Change, operations

# The activation as several kernels: silu is stored before it meets up, and so are the backward's factors.


def _stored_forward(c: Context, x: Operand) -> tuple[Array, mlp.Saved]:
    return _forward(c, x, lambda gate: gate * c.ar.sigmoid(gate))


def _forward(c: Context, x: Operand, silu: Any) -> tuple[Array, mlp.Saved]:
    ar, linear_forward = c.ar, c.ops.linear.forward
    gate, gate_saved = linear_forward(c.at("gate_proj"), x)
    up, up_saved = linear_forward(c.at("up_proj"), x)
    act = ar.at("swiglu.act", ar.at("swiglu.silu", silu(gate)) * up)
    y, down_saved = linear_forward(c.at("down_proj"), ar.operand("down_proj.in", act))
    kept = (ar.keep("swiglu.gate", gate), ar.keep("swiglu.up", up))
    return y, mlp.Saved(*kept, gate_saved, up_saved, c.probe(act), down_saved, c.probe(y))


def _stored_backward(c: Context, dy: Array, saved: mlp.Saved, grads: Gradients) -> Array:
    ar, linear_backward = c.ar, c.ops.linear.backward
    dact = c.joined(linear_backward(c.at("down_proj"), c.joined(dy), saved.down_proj, grads), "act")
    gate, up = saved.gate.value(), saved.up.value()
    s = ar.sigmoid(gate)
    dup = ar.at("d.swiglu.up", dact * ar.at("swiglu.silu", gate * s))
    dsilu = ar.at("d.swiglu.silu", dact * up)
    dgate = ar.at("d.swiglu.gate", dsilu * (s * (1.0 + gate * (1.0 - s))))
    dx = linear_backward(c.at("gate_proj"), dgate, saved.gate_proj, grads)
    return ar.at("d.mlp.in", dx + linear_backward(c.at("up_proj"), dup, saved.up_proj, grads))


SILU_STORED: Change = operations(mlp=lambda ops: Op(_stored_forward, _stored_backward))


# Other formulas of silu.


def _quotient_forward(c: Context, x: Operand) -> tuple[Array, mlp.Saved]:
    with np.errstate(over="ignore"):  # exp(-x) = infinity gives 0, as it should
        return _forward(c, x, lambda gate: gate / (1.0 + c.ar.exp(-gate)))


def _tanh_forward(c: Context, x: Operand) -> tuple[Array, mlp.Saved]:
    def silu(gate: Array) -> Array:
        e = c.ar.exp(-np.abs(gate))
        tanh = np.sign(gate) * ((1.0 - e) / (1.0 + e))  # of half of the argument
        half: Array = 0.5 * gate
        return half + half * tanh

    return _forward(c, x, silu)


SILU_QUOTIENT: Change = operations(mlp=lambda ops: Op(_quotient_forward, _stored_backward))
SILU_TANH: Change = operations(mlp=lambda ops: Op(_tanh_forward, ops.mlp.backward))


# gate_proj and up_proj as one matrix: a row of the input's gradient is one sum over both.


def _fused_forward(c: Context, x: Operand) -> tuple[Array, mlp.Saved]:
    ar = c.ar
    halves = [c.at(name).array("weight") for name in ("gate_proj", "up_proj")]
    gate_up = ar.at("gate_up_proj.out", ar.fprop(x, ar.weight(np.concatenate(halves))))
    gate, up = np.split(gate_up, 2, -1)
    act = ar.at("swiglu.act", gate * ar.sigmoid(gate) * up)
    y, down_saved = c.ops.linear.forward(c.at("down_proj"), ar.operand("down_proj.in", act))
    _, plain = mlp.forward(c, x)  # for what is shown of its parts
    return y, replace(
        plain, gate=ar.keep("swiglu.gate", gate), up=ar.keep("swiglu.up", up), down_proj=down_saved
    )


def _fused_backward(c: Context, dy: Array, saved: mlp.Saved, grads: Gradients) -> Array:
    ar = c.ar
    dact = c.joined(c.ops.linear.backward(c.at("down_proj"), c.joined(dy), saved.down_proj, grads), "act")
    gate, up = saved.gate.value(), saved.up.value()
    s = ar.sigmoid(gate)
    silu = gate * s
    parts = (dact * up * (s + silu * (1.0 - s)), dact * silu)  # dgate, dup
    names = ("gate_proj", "up_proj")
    read = [ar.operand(f"{name}.dy", part) for name, part in zip(names, parts, strict=True)]
    for name, dy_part in zip(names, read, strict=True):
        inner = c.at(name)
        grads.weight(inner.name("weight"), c.microbatch, dy_part, saved.gate_proj.operand)
    whole = np.concatenate([c.at(name).array("weight") for name in names])
    dgate_up = Operand(np.concatenate([part.value for part in read], -1))
    return ar.at("d.mlp.in", ar.dgrad(dgate_up, ar.weight(whole)))


FUSED_GATE_UP: Change = operations(mlp=lambda ops: Op(_fused_forward, _fused_backward))


# Experts one after the other, each added to its tokens; `experts.sum` is where the running sum is stored.


def _scattered(last_first: bool) -> Change:
    def made(ops: Ops) -> Op:
        def forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, experts.Saved]:
            ar = c.ar
            _, saved = ops.experts.forward(c, x, idx, weight)
            slots = saved.slots.value()
            flat, rows = weight.reshape(-1), slots.reshape(-1, slots.shape[-1])
            y = ar.zeros(x.value.shape)
            for group in saved.groups[::-1] if last_first else saved.groups:
                own = ar.at("experts.slot", rows[group.slots] * flat[group.slots][:, None])
                y[group.tokens] = ar.at("experts.sum", y[group.tokens] + own)
            y = ar.at("experts.out", y)
            return y, replace(saved, out=c.probe(y))

        def backward(c: Context, dy: Array, saved: experts.Saved, grads: Gradients) -> tuple[Array, Array]:
            ar, slots = c.ar, saved.slots.value()
            dy = c.joined(dy)
            dweight = ar.matmul(dy[:, None, :], slots)[:, 0]
            flat, dx = saved.weight.reshape(-1), ar.zeros(dy.shape)
            work = list(zip(saved.groups, saved.experts, strict=True))
            for group, own in work[::-1] if last_first else work:
                dout = ar.at("d.experts.slots", flat[group.slots][:, None] * dy[group.tokens])
                dslot = c.ops.mlp.backward(c.at(str(group.expert)), dout, own, grads)
                dx[group.tokens] = ar.at("d.experts.sum", dx[group.tokens] + dslot)
            return ar.at("d.experts.in", dx), dweight

        return Op(forward, backward)

    return operations(experts=made)


SCATTERED: Change = _scattered(last_first=False)
LAST_EXPERT_FIRST: Change = _scattered(last_first=True)


# The weight goes into the activation, before the down projection, which is linear.


@dataclass(frozen=True)
class Weighted:
    groups: list[experts.Group]
    saved: list[Any]  # of each group: x, gate, up, act, weighted act
    weight: Array
    out: Array | None = tensor("")


def _early_forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, Weighted]:
    ar, groups, flat = c.ar, experts.group_tokens(idx), weight.reshape(-1)
    slots = ar.zeros((idx.size, x.value.shape[-1]))
    done = []
    for group in groups:
        inner, own = c.at(str(group.expert)), x.rows(group.tokens)
        gate_part = c.ops.linear.forward(inner.at("gate_proj"), own)[0]
        up = c.ops.linear.forward(inner.at("up_proj"), own)[0]
        act = gate_part * ar.sigmoid(gate_part) * up
        weighted = ar.operand("experts.down_proj.in", act * flat[group.slots][:, None])
        slots[group.slots] = c.ops.linear.forward(inner.at("down_proj"), weighted)[0]
        done.append((own, gate_part, up, act, weighted))
    y = ar.at("experts.out", ar.sum(slots.reshape(*idx.shape, -1), 1))
    return y, Weighted(groups, done, weight, c.probe(y))


def _early_backward(c: Context, dy: Array, saved: Weighted, grads: Gradients) -> tuple[Array, Array]:
    ar, flat, dy = c.ar, saved.weight.reshape(-1), c.joined(dy)
    dslots, dweight = ar.zeros((flat.size, dy.shape[-1])), ar.zeros(flat.shape)
    for group, (own, gate_part, up, act, weighted) in zip(saved.groups, saved.saved, strict=True):
        inner = c.at(str(group.expert))
        out = ar.operand("experts.down_proj.dy", dy[group.tokens])
        grads.weight(inner.name("down_proj.weight"), c.microbatch, out, weighted)
        dweighted = ar.at("experts.down_proj.dx", ar.dgrad(out, inner.weight("down_proj.weight")))
        dweight[group.slots] = ar.dot(dweighted, act)
        dact = dweighted * flat[group.slots][:, None]
        s = ar.sigmoid(gate_part)
        silu = gate_part * s
        dgate, dup = dact * up * (s + silu * (1.0 - s)), dact * silu
        total = ar.zeros(own.value.shape)
        for name, part in (("gate_proj", dgate), ("up_proj", dup)):
            read = ar.operand(f"experts.{name}.dy", part)
            grads.weight(inner.name(f"{name}.weight"), c.microbatch, read, own)
            total = total + ar.at(f"experts.{name}.dx", ar.dgrad(read, inner.weight(f"{name}.weight")))
        dslots[group.slots] = total
    dx = ar.sum(dslots.reshape(*saved.weight.shape, -1), 1)
    return ar.at("d.experts.in", dx), dweight.reshape(saved.weight.shape)


WEIGHTED_EARLY: Change = operations(experts=lambda ops: Op(_early_forward, _early_backward))


# The shared expert as one more of the routed ones, with weight 1: one sum over K + 1 slots.


def _one_more(ops: Ops) -> Op:
    def forward(c: Context, x: Array) -> tuple[Array, Any]:
        y, saved = ops.moe.forward(c, x)
        if not isinstance(saved, moe.Saved) or saved.shared is None:
            return y, saved
        ar, slots, weight = c.ar, saved.routed.slots.value(), saved.routed.weight
        shared, _ = ops.mlp.forward(c.at("shared_experts"), ar.operand("mlp.in", x))
        every = np.concatenate([shared[:, None], slots], 1)  # (T, K + 1, D)
        weights = np.concatenate([np.ones_like(weight[:, :1]), weight], 1)
        y = ar.at("moe.out", ar.matmul(weights[:, None, :], every.swapaxes(1, 2))[:, 0])
        return y, replace(saved, out=c.probe(y))

    return Op(forward, ops.moe.backward)


ONE_MORE: Change = operations(moe=_one_more)
