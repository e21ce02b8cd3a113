"""How close the gate's decisions are.  SPEC VERDICT-8.

A row's margin is the smallest change of the numbers it is decided on that gives another set of experts: the
distance of the last chosen from the first rejected expert among the kept groups, or that of the last kept
from the first dropped group, divided by the number of experts that make a group's score.  The doubt is how
far an implementation's numbers may be from the exact ones.  Two numbers move towards each other, so a
decision is certain when its margin exceeds twice the doubt.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.cases.claims import PARTS
from refimpl.cases.format import upwards
from refimpl.cases.tolerances import Judges
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import gate
from refimpl.numerics.arithmetic import Array


def margins(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    """choice (T, N): the scores with the selection bias  ->  (T,), infinite where nothing could be
    different."""
    kept = gate.kept_groups(choice, config, choices)  # (T, N)
    inside = -np.sort(np.where(kept, -choice, np.inf), axis=-1)
    k = config.num_experts_per_tok
    margin = np.full(len(choice), np.inf)
    if k < config.n_routed_experts:
        with np.errstate(invalid="ignore"):
            margin = inside[:, k - 1] - inside[:, k]
    if config.kept_groups < config.groups:
        scores = -np.sort(-gate.group_scores(choice, config, choices), axis=-1)
        gap = scores[:, config.kept_groups - 1] - scores[:, config.kept_groups]
        count = choices.group_score_count(config) if config.has_selection_bias else 1
        margin = np.minimum(margin, gap / count)
    return margin


def doubts(scores: Array, choice: Array, judges: Judges) -> dict[str, Array]:
    """scores, choice (T, N)  ->  kind -> (T,), per unit of each roundoff; adding the bias and joining a
    group's scores are a rounding each."""
    found: dict[str, Array] = {}
    for kind in PARTS:
        row = np.zeros(len(choice))
        if f"bound.{kind}" in judges.arrays:
            row = judges.arrays[f"bound.{kind}"].reshape(len(choice), -1).max(-1)
        if kind == "accumulate":
            row = row + 2.0 * np.abs(choice).max(-1)
        if row.any():
            found[f"doubt.{kind}"] = upwards(row)
    return found


def choice_of(scores: Array, weights: Mapping[str, Array], path: str) -> Array:
    """What the gate at `path` chooses by: its scores (T, N), with the selection bias where it has one."""
    flat = scores.reshape(-1, scores.shape[-1])
    bias = weights.get(f"{path}.e_score_correction_bias")
    return flat if bias is None else flat + bias
