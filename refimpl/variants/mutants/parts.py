"""What mistakes of the gate and of the experts are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import gate
from refimpl.layers.context import Context, Cotangents, Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.variants.variation import Change, operations

Select = Callable[[Array, ModelConfig, Choices], Array]  # choice (T, N)  ->  topk_idx (T, K)
Divisor = Callable[[Context, Array], tuple[Array, Any]]  # sum (T, 1)  ->  divisor (T, 1), its derivative


def bias_of(c: Context) -> Array:
    """The selection bias (N,), or zeros where the gate has none."""
    if not c.config.has_selection_bias:
        return c.ar.zeros((c.config.n_routed_experts,))
    return c.array("e_score_correction_bias")


def chooser(select: Select) -> Change:
    """Another selection by the biased scores."""
    return operations(
        choose=lambda ops: lambda c, s: select(c.ar.decide(s + bias_of(c)), c.config, c.choices)
    )


def best(choice: Array, kept: Array, config: ModelConfig) -> Array:
    """choice (T, N) where kept (T, N) holds  ->  topk_idx (T, K), ties to the lower index."""
    left = np.where(kept, choice, -np.inf)
    return np.argsort(-left, axis=-1, kind="stable")[:, : config.num_experts_per_tok]


def kept_by(score: Array, config: ModelConfig) -> Array:
    """score of groups (T, G)  ->  (T, N) bool: whether the expert's group is kept."""
    if config.kept_groups == config.groups:
        return np.ones((len(score), config.n_routed_experts), bool)
    kept = np.zeros(score.shape, bool)
    first = np.argsort(-score, axis=-1, kind="stable")[:, : config.kept_groups]
    np.put_along_axis(kept, first, True, -1)
    return np.repeat(kept, config.experts_per_group, -1)


def plus_epsilon(c: Context, total: Array) -> tuple[Array, Any]:
    """The divisor that is right."""
    return total + c.choices.topk_norm_epsilon, 1.0


def as_configured(c: Context) -> bool:
    """Whether weights are normalised."""
    return gate.weight_rule(c.config, c.choices)[1]


def weighted(
    moved: Callable[[Context], Array] | None = None,
    divisor: Divisor = plus_epsilon,
    normalised: Callable[[Context], bool] = as_configured,
) -> Change:
    """weight = v / divisor(sum v) * scale with v = (scores + moved)[idx]; without `normalised`, v * scale."""

    def parts(c: Context, scores: Array, idx: Array) -> tuple[Array, Array, Any]:
        v = np.take_along_axis(scores, idx, -1)  # (T, K)
        v = v if moved is None else v + moved(c)[idx]
        if not normalised(c):
            return v, np.ones((len(v), 1)), 0.0
        return v, *divisor(c, c.ar.sum(v)[:, None])

    def changed(ops: Ops) -> Op:
        def forward(c: Context, x: Array) -> tuple[Array, Array, gate.Saved]:
            idx, _, saved = ops.gate.forward(c, x)
            v, by, _ = parts(c, saved.scores, idx)
            weight = v / by * gate.weight_rule(c.config, c.choices)[0]
            return idx, weight, replace(saved, topk_weight=weight)

        def backward(c: Context, dweight: Array, saved: gate.Saved, grads: Gradients) -> Array:
            dweight = c.joined(dweight, "topk_weight")
            v, by, slope = parts(c, saved.scores, saved.topk_idx)
            dv = (dweight - slope * c.ar.dot(dweight, v / by)[:, None]) / by  # (T, K)
            dv = dv * gate.weight_rule(c.config, c.choices)[0]
            # what is left is the gate that takes scores as they are
            config = replace(c.config, norm_topk_prob=False, routed_scaling_factor=1.0)
            dx: Array = ops.gate.backward(
                replace(c, config=config, cotangents=Cotangents({})), dv, saved, grads
            )
            return dx

        return Op(forward, backward)

    return operations(gate=changed)


def of_scores(c: Context, scores: Array, idx: Array) -> Array:
    """scores (T, N), idx (T, K)  ->  topk_weight (T, K), as is right."""
    chosen = np.take_along_axis(scores, idx, -1)
    scale, norm = gate.weight_rule(c.config, c.choices)
    if norm:
        chosen = chosen / plus_epsilon(c, c.ar.sum(chosen)[:, None])[0]
    return chosen * scale
