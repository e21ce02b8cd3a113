"""The gate computed in other ways.  SPEC ROUTE-2 to ROUTE-7."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refimpl.layers import gate
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.contraction import mean
from refimpl.programs import Setting
from refimpl.variants.variation import Change, operations, stored


def _reciprocal(ops: Ops) -> Op:
    def forward(c: Context, x: Array) -> tuple[Array, Array, gate.Saved]:
        idx, weight, saved = ops.gate.forward(c, x)
        scale, normalised = gate.weight_rule(c.config, c.choices)
        if normalised:
            chosen = np.take_along_axis(saved.scores, idx, -1)
            each = (scale / (c.ar.sum(chosen) + c.choices.topk_norm_epsilon))[:, None]
            weight = c.ar.at("gate.weights", chosen * each)
        return idx, weight, replace(saved, topk_weight=weight)

    return Op(forward, ops.gate.backward)


RECIPROCAL: Change = operations(gate=_reciprocal)  # one factor for all weights of a token


def _from_below(c: Context, scores: Array) -> Array:
    """The selection from ascending sorts: ties go to the higher index, and ids come in ascending order."""
    config, choice = c.config, scores
    if config.has_selection_bias:
        choice = c.ar.at("gate.choice", scores + c.array("e_score_correction_bias"))
    choice = c.ar.decide(choice)
    if config.kept_groups != config.groups:
        score = gate.group_scores(choice, config, c.choices)
        best = np.argsort(score, axis=-1, kind="stable")[:, -config.kept_groups :]
        kept = np.zeros(score.shape, bool)
        np.put_along_axis(kept, best, True, -1)
        choice = np.where(np.repeat(kept, config.experts_per_group, -1), choice, -np.inf)
    return np.sort(np.argsort(choice, axis=-1, kind="stable")[:, -config.num_experts_per_tok :], -1)


OTHER_SORT: Change = operations(choose=lambda ops: _from_below)


def _centred(bias: Array) -> Array:
    centre = float(np.float32(mean(np.asarray(bias, np.float64))))
    return np.asarray(bias - centre)


def CENTRED(s: Setting) -> Setting:  # noqa: N802 - a change like the others
    """The bias without its mean: a constant moves no choice."""
    return stored("*.e_score_correction_bias", _centred, lambda gradient: gradient)(s)
