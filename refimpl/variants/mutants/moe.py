"""Mistakes of experts: their combination, the shared ones, SwiGLU, their gradients.  SPEC MOE-1 to MOE-5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

import numpy as np

from refimpl.config.model import ModelConfig
from refimpl.layers import experts, linear
from refimpl.layers.context import Context, Op, Ops, tensor
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.gradients import Gradients
from refimpl.programs import Outputs, Setting
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Step, behind, inside, named
from refimpl.variants.variation import Change, finished, operations


def _shared_times(factor: Callable[[ModelConfig], float]) -> Change:
    """y = routed + factor shared."""
    scaled = Step(
        lambda c, y: (factor(c.config) * y, None),
        lambda c, dy, kept: factor(c.config) * dy,
    )
    return inside("moe", **behind("mlp", scaled, named("shared_experts")))


def _first_rank(c: Context, idx: Array) -> Array:
    """Which of the slots are on the first of two ranks, which has the first half of the experts."""
    return idx < c.config.n_routed_experts // 2


def _one_rank_only(ops: Ops) -> Op:
    """The sums of the second rank are missing."""

    def forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, _Ranked]:
        here = np.where(_first_rank(c, idx), 1.0, 0.0)
        y, saved = ops.experts.forward(c, x, idx, weight * here)
        return y, _Ranked(saved, here, saved.out)

    def backward(c: Context, dy: Array, saved: _Ranked, grads: Gradients) -> tuple[Array, Array]:
        dx, dweight = ops.experts.backward(c, dy, saved.own, grads)
        return dx, dweight * saved.here

    return Op(forward, backward)


@dataclass(frozen=True)
class _Ranked:
    own: experts.Saved
    here: Array  # (T, K)
    out: Array | None = tensor("")


def _not_reduced(ops: Ops) -> Op:
    """dx of a token lacks what the experts of the other rank give; tokens are halved between two ranks."""

    def backward(c: Context, dy: Array, saved: experts.Saved, grads: Gradients) -> tuple[Array, Array]:
        right = ops.experts.backward(c, dy, saved, grads)
        first = np.arange(len(dy)) < len(dy) // 2  # (T,)
        dx = np.zeros_like(right[0])
        for group, expert in zip(saved.groups, saved.experts, strict=True):
            own = group.expert < c.config.n_routed_experts // 2
            weight = saved.weight.reshape(-1)[group.slots] * (first[group.tokens] == own)
            dout = weight[:, None] * dy[group.tokens]
            at = c.at(str(group.expert))
            dx[group.tokens] += c.ops.mlp.backward(at, dout, expert, Gradients(c.ar))
        return dx, right[1]

    return Op(ops.experts.forward, backward)


# G20: the weight is multiplied into the input of down_proj.


@dataclass(frozen=True)
class _Weighted:
    """One expert: what SwiGLU's backward needs, and the weight of each of its tokens."""

    group: experts.Group
    gate: Array
    up: Array
    gate_proj: linear.Saved
    up_proj: linear.Saved
    down_proj: linear.Saved


@dataclass(frozen=True)
class _Early:
    parts: list[_Weighted]
    weight: Array
    out: Array | None = tensor("")


def _weight_before_down(ops: Ops) -> Op:
    def forward(c: Context, x: Operand, idx: Array, weight: Array) -> tuple[Array, _Early]:
        ar, call = c.ar, c.ops.linear.forward
        y, parts = ar.zeros(x.value.shape), []
        slots = ar.zeros((idx.size, x.value.shape[-1]))
        for group in experts.group_tokens(idx):
            at, rows = c.at(str(group.expert)), x.rows(group.tokens)
            g, gate_saved = call(at.at("gate_proj"), rows)
            u, up_saved = call(at.at("up_proj"), rows)
            w = weight.reshape(-1)[group.slots][:, None]
            act = w * (g * ar.sigmoid(g) * u)
            slots[group.slots], down = call(at.at("down_proj"), ar.operand("down_proj.in", act))
            parts.append(_Weighted(group, g, u, gate_saved, up_saved, down))
        y = ar.sum(slots.reshape(*idx.shape, -1), 1)
        return y, _Early(parts, weight, y)

    def backward(c: Context, dy: Array, saved: _Early, grads: Gradients) -> tuple[Array, Array]:
        ar, call, dy = c.ar, c.ops.linear.backward, c.joined(dy)
        dslots, dweight = ar.zeros((saved.weight.size, dy.shape[-1])), ar.zeros((saved.weight.size,))
        for p in saved.parts:
            at, w = c.at(str(p.group.expert)), saved.weight.reshape(-1)[p.group.slots][:, None]
            s = ar.sigmoid(p.gate)
            silu = p.gate * s
            dscaled = call(at.at("down_proj"), dy[p.group.tokens], p.down_proj, grads)
            dweight[p.group.slots] = ar.dot(dscaled, silu * p.up)
            dact = w * dscaled
            dgate = dact * p.up * (s + silu * (1.0 - s))
            dx = call(at.at("gate_proj"), dgate, p.gate_proj, grads)
            dslots[p.group.slots] = dx + call(at.at("up_proj"), dact * silu, p.up_proj, grads)
        shape = (*saved.weight.shape, -1)
        return ar.sum(dslots.reshape(shape), 1), dweight.reshape(saved.weight.shape)

    return Op(forward, backward)


def _swapped(name: str) -> str:
    """The name with gate_proj and up_proj exchanged."""
    parts = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return ".".join(parts.get(part, part) for part in name.split("."))


def _halves_swapped(s: Setting) -> Setting:
    """Both weights under each other's names, and so are their outputs and gradients, which is undone."""
    weights = {_swapped(name): w for name, w in s.weights.items()}
    back = lambda outputs: {_swapped(name): value for name, value in outputs.items()}  # noqa: E731
    return replace(s, weights=weights, after=(*s.after, back))


def _dropped(outputs: Outputs) -> Outputs:
    """Weight gradients of linears that nobody adds."""
    linears = {name for name in outputs if fnmatchcase(name, "grad.*_proj*.weight")}
    return {name: np.zeros_like(v) if name in linears else v for name, v in outputs.items()}


MUTANTS: Final = (
    Mutant("G14a", _shared_times(lambda config: 1.0 / config.routed_scaling_factor)),
    Mutant("G14b", _shared_times(lambda config: config.routed_scaling_factor)),
    Mutant("G15", _shared_times(lambda config: 0.0)),
    Mutant("G20", operations(experts=_weight_before_down), benign=True),
    Mutant("G21", _halves_swapped),
    Mutant("L15", finished(_dropped)),
    Mutant("L16", operations(experts=_not_reduced)),
    Mutant("X03a", _shared_times(lambda config: 2.0)),
    Mutant("X03b", operations(experts=_one_rank_only)),
)
