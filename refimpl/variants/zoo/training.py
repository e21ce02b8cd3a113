"""Training computed in other ways: AdamW, the norm, the sum of microbatches, the balance loss, MTP.

SPEC OPTIM-1 to OPTIM-4, STEP-3, BALANCE-1, MTP-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.config.training import TrainingConfig
from refimpl.layers import balance
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.programs import Setting
from refimpl.training.adamw import Powers
from refimpl.training.rules import Rules
from refimpl.variants.variation import Change, operations

_Moved = tuple[Array, Array, Array]


def _ruled(**made: Callable[[Rules], Any]) -> Change:
    """Rules of the step replaced, each made from the rules as they were."""
    return lambda s: replace(
        s, rules=replace(s.rules, **{name: make(s.rules) for name, make in made.items()})
    )


def _kept(ar: Arithmetic, *values: Array) -> Any:
    sites = ("optim.master", "optim.moment1", "optim.moment2")
    return tuple(ar.at(site, value) for site, value in zip(sites, values, strict=True))


def _decayed(training: TrainingConfig, rate: float, weight: Array) -> Array:
    if training.weight_decay and (training.weight_decay_on == "all" or weight.ndim >= 2):
        return weight * (1.0 - rate * training.weight_decay)
    return weight


def _fused(
    ar: Arithmetic, t: TrainingConfig, rate: float, powers: Powers, w: Array, m: Array, v: Array, g: Array
) -> _Moved:
    """As torch's fused kernel: a factor of decay, moments as two products, the step size times m last."""
    w = _decayed(t, rate, w)
    m = t.adam_beta1 * m + (1.0 - t.adam_beta1) * g
    v = t.adam_beta2 * v + (1.0 - t.adam_beta2) * (g * g)
    size = rate / (1.0 - powers.beta1)
    denominator = ar.sqrt(v) / math.sqrt(1.0 - powers.beta2) + t.adam_epsilon
    made: _Moved = _kept(ar, w - (size * m) / denominator, m, v)
    return made


def _corrected_first(
    ar: Arithmetic, t: TrainingConfig, rate: float, powers: Powers, w: Array, m: Array, v: Array, g: Array
) -> _Moved:
    """As the paper of Adam: corrected moments, then the step; decay joins the step."""
    m = m + (1.0 - t.adam_beta1) * (g - m)
    v = v + (1.0 - t.adam_beta2) * (g * g - v)
    moved = (m / (1.0 - powers.beta1)) / (ar.sqrt(v / (1.0 - powers.beta2)) + t.adam_epsilon)
    made: _Moved = _kept(ar, _decayed(t, rate, w) - rate * moved, m, v)
    return made


def _norm_of_norms(ar: Arithmetic, gradients: Iterable[Array]) -> Array:
    """The norm of each tensor, then the norm of these, as torch computes it."""
    norms = np.stack([ar.sqrt(ar.dot(g.reshape(-1), g.reshape(-1))) for g in gradients])
    return ar.sqrt(ar.dot(norms, norms))


def _by_token(ops: Ops) -> Op:
    """The mean over tokens of sum_i g[i] p[t, i], instead of sum_i g[i] of the mean of p."""

    def forward(c: Context, scores: Array, idx: Array) -> tuple[Mapping[str, Array], balance.Saved]:
        ar, given = c.ar, c.balancing
        _, saved = ops.balance.forward(c, scores, idx)
        of = given.sequence[saved.rows]
        tokens = ar.array(np.maximum(saved.tokens, 1))
        losses = {}
        for kind, factors in saved.factors.items():
            each = ar.dot(factors[of], saved.shares.get(kind, scores[saved.rows]))  # (M,)
            losses[kind] = ar.segment_sum(each[:, None], of, given.number)[:, 0] / tokens
        value = c.probe(np.stack(list(losses.values())))
        return losses, replace(saved, losses=losses, value=value)

    return Op(forward, ops.balance.backward)


def _positions_of_hidden(s: Setting) -> Setting:
    """The other alternative of MTP's positions: attention knows their differences only."""
    other = "hidden" if s.choices.mtp_positions == "token" else "token"
    return replace(s, choices=replace(s.choices, mtp_positions=other))


def _backwards(s: Setting) -> Setting:
    """The gradients of several tensors are joined in the other order."""
    norm = s.rules.norm
    return replace(s, rules=replace(s.rules, norm=lambda ar, gradients: norm(ar, list(gradients)[::-1])))


FUSED_ADAMW: Final[Change] = _ruled(adamw=lambda rules: _fused)
CORRECTED_FIRST: Final[Change] = _ruled(adamw=lambda rules: _corrected_first)
NORM_OF_NORMS: Final[Change] = _ruled(norm=lambda rules: _norm_of_norms)
LAST_TENSOR_FIRST: Final[Change] = _backwards
BY_TOKEN: Final[Change] = operations(balance=_by_token)
POSITIONS_OF_HIDDEN: Final[Change] = _positions_of_hidden
