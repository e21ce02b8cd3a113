"""Mistakes of the gate: who goes where, and with which weight.  SPEC ROUTE-1 to ROUTE-9."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import gate
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import BF16, round_to
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.mutants.parts import best, bias_of, chooser, kept_by, of_scores, weighted
from refimpl.variants.variation import both, configured, operations, rounded, stored

BIAS: Final = "*e_score_correction_bias"
FLOOR: Final = 6.1e-5  # about the smallest normal number of float16
COARSER: Final = ("fp32", "tf32", "fp16")  # rounding to bf16 is within what a port of bf16 may do


def _largest(choice: Array, config: ModelConfig) -> Array:
    """The largest choice of each group, (T, G)."""
    return np.asarray(choice.reshape(len(choice), config.groups, config.experts_per_group).max(-1))


def _by_largest(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    return best(choice, kept_by(_largest(choice, config), config), config)


def _zero_filled(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    filled = np.where(gate.kept_groups(choice, config, choices), choice, 0.0)
    return best(filled, np.ones(choice.shape, bool), config)


def _ungrouped(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    return best(choice, np.ones(choice.shape, bool), config)


def _higher_first(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    return np.asarray(config.n_routed_experts - 1 - gate.select(choice[:, ::-1], config, choices))


def _groups_by_scores(c: Context, scores: Array) -> Array:
    kept = gate.kept_groups(c.ar.decide(scores), c.config, c.choices)
    return best(c.ar.decide(scores + bias_of(c)), kept, c.config)


def _without_bias(c: Context, scores: Array) -> Array:
    return _by_largest(c.ar.decide(scores), c.config, c.choices)


def _by_scores(c: Context, scores: Array) -> Array:
    return gate.select(c.ar.decide(scores), c.config, c.choices)


def _floored(c: Context, total: Array) -> tuple[Array, Any]:
    above = c.ar.decide(total) > FLOOR
    return np.where(above, total, FLOOR), np.where(above, 1.0, 0.0)


def _softmax_after_mask(ops: Ops) -> Op:
    def forward(c: Context, x: Array) -> tuple[Array, Array, gate.Saved]:
        idx, weight, saved = ops.gate.forward(c, x)
        if c.config.scoring_func != "softmax":
            return idx, weight, saved
        kept = gate.kept_groups(c.ar.decide(saved.scores), c.config, c.choices)  # (T, N)
        part = np.where(kept, saved.scores, 0.0)
        scores = part / c.ar.sum(part)[:, None]  # which is the softmax over what is kept
        weight = of_scores(c, scores, idx)
        return idx, weight, replace(saved, scores=scores, topk_weight=weight)

    return Op(forward, ops.gate.backward)  # it reads the scores


def _bias_inside(ops: Ops) -> Op:
    def forward(c: Context, x: Array) -> tuple[Array, Array, gate.Saved]:
        idx, weight, saved = ops.gate.forward(c, x)
        if not c.config.has_selection_bias:
            return idx, weight, saved
        scores = c.ar.sigmoid(c.ar.matmul(saved.x.value, c.array("weight")) + bias_of(c))
        idx = c.ops.choose(c, scores)
        weight = of_scores(c, scores, idx)
        return idx, weight, replace(saved, scores=scores, topk_idx=idx, topk_weight=weight)

    return Op(forward, ops.gate.backward)  # s (1 - s) is the derivative wherever the bias is


MUTANTS: Final = (
    Mutant("G01", weighted(moved=bias_of)),
    Mutant("G02", stored(BIAS, lambda b: round_to(b, BF16), lambda gradient: gradient), COARSER),
    Mutant("G03", rounded(BF16, "gate.logits"), COARSER),
    Mutant("G04", chooser(_zero_filled)),
    Mutant("G05", chooser(_by_largest)),
    Mutant("G06", operations(choose=lambda ops: _without_bias)),
    Mutant("G07a", configured(scoring_func="softmax")),
    Mutant("G07b", chooser(_ungrouped)),
    Mutant("G07c", both(configured(scoring_func="softmax"), chooser(_ungrouped))),
    Mutant("G08", operations(gate=_softmax_after_mask)),
    Mutant("G09a", weighted(normalised=lambda c: False)),
    Mutant("G09b", weighted(normalised=lambda c: True)),
    Mutant("G10a", weighted(divisor=_floored)),
    Mutant("G10b", weighted(divisor=lambda c, total: (total + 1e-6, 1.0))),
    Mutant(
        "G11",
        configured(routed_scaling_factor=lambda c: c.routed_scaling_factor if c.norm_topk_prob else 1.0),
    ),
    Mutant(
        "G12", configured(routed_scaling_factor=lambda c: c.routed_scaling_factor * c.routed_scaling_factor)
    ),
    Mutant("G13", configured(routed_scaling_factor=1.0)),
    Mutant("G16", chooser(_higher_first), benign=True),
    Mutant("G17", rounded(BF16, "gate.weights"), COARSER),
    Mutant("G18", operations(choose=lambda ops: _groups_by_scores)),
    Mutant("G19", both(operations(choose=lambda ops: _by_scores), operations(gate=_bias_inside))),
)
