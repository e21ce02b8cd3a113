"""The gate: which experts a token goes to, and with which weights.  SPEC ROUTE-1 to ROUTE-9.

scores = sigmoid(x W^T) or softmax(x W^T);  choice = scores + bias (V3), scores (V2)
groups:  score of a group = sum of its 2 largest choices (V3), its largest (V2); outside of the best
         `topk_group` groups the choice is -inf
topk_idx = the K experts of largest choice, in descending order, ties to the lower index
weight   = scores[topk_idx], without the bias; normalised to sum 1; times routed_scaling_factor

Backward, with S the sum over the chosen scores (plus epsilon) and G = dweight:
    dscore_k = scale (G_k - sum_j G_j score_j / S) / S for chosen experts, 0 for the others
    dlogit = dscore s (1 - s), or s (dscore - <dscore, s>) for softmax.  The bias and the choice get none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers.context import Context, Op, Ops, tensor
from refimpl.numerics.arithmetic import Array, Dropped, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    x: Operand | Dropped  # (T, D)
    logits: Array | None = tensor("logits")  # (T, N)
    scores: Array = tensor("scores")  # (T, N)
    topk_idx: Array = tensor("topk_idx")  # (T, K) int
    topk_weight: Array = tensor("topk_weight")  # (T, K)
    weight_given: bool = False  # forced weights are constants


def forward(c: Context, x: Array) -> tuple[Array, Array, Saved]:
    """x (T, D)  ->  topk_idx (T, K) int, topk_weight (T, K)."""
    ar = c.ar
    hidden = ar.operand("gate.in", x)  # (T, D)
    logits = ar.at("gate.logits", ar.matmul(hidden.value, c.array("weight")))  # (T, N)
    scores = ar.at("gate.scores", _score(c, logits))  # (T, N)
    idx = c.ops.choose(c, scores)  # (T, K)
    chosen = np.take_along_axis(scores, idx, -1)  # (T, K)
    scale, normalised = weight_rule(c.config, c.choices)
    if normalised:
        total = ar.fused("gate.sum", ar.sum(chosen)) + c.choices.topk_norm_epsilon  # (T,)
        chosen = ar.fused("gate.sum", chosen / total[:, None])
    weight = ar.at("gate.weights", chosen * scale)  # (T, K)
    return idx, weight, Saved(hidden.kept, c.probe(logits), scores, idx, weight)


def backward(c: Context, dweight: Array, saved: Saved, grads: Gradients) -> Array:
    """dweight (T, K)  ->  dx (T, D); adds the router's gradient."""
    ar, scores = c.ar, saved.scores  # (T, N)
    dweight = c.joined(dweight, "topk_weight")
    if saved.weight_given:
        dweight = np.zeros_like(dweight)
    chosen = np.take_along_axis(scores, saved.topk_idx, -1)  # (T, K)
    scale, normalised = weight_rule(c.config, c.choices)
    if normalised:
        total = (ar.sum(chosen) + c.choices.topk_norm_epsilon)[:, None]  # (T, 1)
        dweight = (dweight - ar.dot(dweight, chosen / total)[:, None]) / total  # (T, K)
    dscores = c.joined(_scatter(dweight * scale, saved.topk_idx, scores), "scores")  # (T, N)
    if c.config.scoring_func == "sigmoid":
        dlogits = dscores * scores * (1.0 - scores)  # (T, N)
    else:
        dlogits = ar.dsoftmax(scores, dscores)
    dlogits = ar.at("d.gate.logits", c.joined(dlogits, "logits"))
    assert isinstance(saved.x, Operand), "the router's input was not computed again"
    dy = ar.operand("gate.dy", dlogits)  # (T, N)
    grads.weight(c.name("weight"), c.microbatch, dy, saved.x)
    return ar.at("d.gate.in", ar.matmul(dy.value, c.array("weight").T))  # (T, D)


def choose(c: Context, scores: Array) -> Array:
    """scores (T, N)  ->  topk_idx (T, K) int: the experts of each token."""
    choice = scores  # (T, N)
    if c.config.has_selection_bias:
        choice = c.ar.at("gate.choice", scores + c.array("e_score_correction_bias"))
    return select(c.ar.decide(choice), c.config, c.choices)


def forced(ops: Ops, routing: Mapping[str, tuple[Array, Array | None]]) -> Ops:
    """The operations with the experts given: {path of the gate: (topk_idx (T, K), topk_weight (T, K) or
    None)}.  Given weights are constants; without them they come from the scores of the given experts."""

    def given_experts(c: Context, scores: Array) -> Array:
        return routing[c.path][0] if c.path in routing else ops.choose(c, scores)

    def given_weights(c: Context, x: Array) -> tuple[Array, Array, Saved]:
        idx, own, saved = ops.gate.forward(c, x)
        weight = routing.get(c.path, (None, None))[1]
        if weight is None:
            return idx, own, saved
        given = c.ar.array(weight)
        return idx, given, replace(saved, topk_weight=given, weight_given=True)

    return replace(ops, choose=given_experts, gate=Op(given_weights, ops.gate.backward))


def select(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    """choice (T, N) real  ->  topk_idx (T, K) int, by descending choice, ties to the lower index."""
    kept = np.where(kept_groups(choice, config, choices), choice, -np.inf)  # (T, N)
    return np.argsort(-kept, axis=-1, kind="stable")[:, : config.num_experts_per_tok]


def kept_groups(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    """choice (T, N) real  ->  (T, N) bool: whether the expert's group is kept."""
    if config.kept_groups == config.groups:
        return np.ones(choice.shape, bool)
    score = group_scores(choice, config, choices)  # (T, G)
    best = np.argsort(-score, axis=-1, kind="stable")[:, : config.kept_groups]
    kept = np.zeros(score.shape, bool)
    np.put_along_axis(kept, best, True, -1)
    return np.repeat(kept, config.experts_per_group, -1)


def group_scores(choice: Array, config: ModelConfig, choices: Choices) -> Array:
    """choice (T, N) real  ->  (T, G): the sum of a group's largest choices, added from the largest down."""
    count = choices.group_score_count(config) if config.has_selection_bias else 1
    grouped = choice.reshape(len(choice), config.groups, config.experts_per_group)
    largest = -np.sort(-grouped, axis=-1)[..., :count]  # (T, G, count)
    score = largest[..., 0]
    for i in range(1, count):
        score = score + largest[..., i]
    return score


def weight_rule(config: ModelConfig, choices: Choices) -> tuple[float, bool]:
    """(factor of the routing weights, whether they are normalised first)."""
    scale, single = config.routed_scaling_factor, config.num_experts_per_tok == 1
    if not config.norm_topk_prob:
        return scale, False
    if config.has_selection_bias:
        return scale, not (single and choices.topk_norm_single == "leave")
    if single or choices.v2_topk_norm == "ignore":
        return scale, False
    return (1.0 if choices.v2_topk_norm == "normalise_unscaled" else scale), True


def _score(c: Context, logits: Array) -> Array:
    """logits (T, N)  ->  scores (T, N)."""
    return c.ar.sigmoid(logits) if c.config.scoring_func == "sigmoid" else c.ar.softmax(logits)


def _scatter(values: Array, idx: Array, like: Array) -> Array:
    """values (T, K) at idx (T, K)  ->  (T, N), exact zeros elsewhere."""
    dense = np.zeros_like(like)
    np.put_along_axis(dense, idx, values, -1)
    return dense
