"""The whole model's hand-written backward against the complex step, for drawn configurations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import (
    COMPLEX,
    STEP,
    V2,
    YARN,
    config,
    model,
    random_ids,
    random_weights,
)

import refimpl
from refimpl.checkpoint.weights import DictWeights
from refimpl.config.choices import PROFILES, Choices
from refimpl.config.model import ModelConfig
from refimpl.layers.context import Op
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.model import Model

# No truncation error, so what is left is float64's rounding, which grows with the depth and with how much the
# drawn layers amplify: the worst of 1000 drawn models was 6e-13 of the size of the summed terms.
TOLERANCE = 1e-10


def complex_loss(cfg: ModelConfig, choices: Choices, weights: dict[str, Any], ids: Any, more: Any) -> complex:
    """The loss, complex: `Result.loss` is a float, so the operation is replaced by one that tells."""
    told = []

    def forward(*args: Any) -> Any:
        value, saved = DEEPSEEK_V3.loss.forward(*args)
        told.append(value)
        return value.real, saved

    ops = replace(DEEPSEEK_V3, loss=Op(forward, DEEPSEEK_V3.loss.backward))
    Model(cfg, DictWeights(cfg, weights), COMPLEX, choices, ops).forward(ids, trace=(), **more)
    return complex(told[0])


@st.composite
def configurations(draw: Any) -> ModelConfig:
    v2 = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 4]))
    kept = draw(st.integers(1, groups))
    size = draw(st.integers(2, 3))
    fields: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "moe_layer_freq": draw(st.integers(1, 2)),
        "hidden_size": draw(st.integers(3, 12)),
        "q_lora_rank": draw(st.sampled_from([None, 4, 7])),
        "kv_lora_rank": draw(st.integers(2, 6)),
        "num_attention_heads": draw(st.integers(1, 3)),
        "qk_nope_head_dim": draw(st.integers(1, 5)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 6])),
        "v_head_dim": draw(st.integers(1, 5)),
        "n_group": groups,
        "topk_group": kept,
        "n_routed_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1, kept * size)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "norm_topk_prob": draw(st.booleans()),
        "scoring_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "rope_interleave": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, YARN, YARN | {"mscale": 1.3}])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
    }
    if v2:
        fields |= V2 | {
            "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"])),
            "norm_topk_prob": draw(st.booleans()),
        }
    return config(**fields)


def worst_error(cfg: ModelConfig, choices: Choices, seed: int, more: Any = None) -> float:
    """Over all parameters, along one random direction each."""
    more = more or {}
    ids = random_ids(cfg, (2, 5), seed)
    more = {"labels": ids} | more
    weights, rng = random_weights(cfg, seed), np.random.default_rng(seed)
    one = refimpl.load((cfg, weights), "float64", choices)
    result = one.forward(ids, trace="*.topk_idx", **more)
    carried = Model(
        cfg, DictWeights(cfg, {k: w + 0j for k, w in weights.items()}), COMPLEX, choices, DEEPSEEK_V3
    )
    logits_only = {k: v for k, v in more.items() if k not in ("labels", "targets")}
    other = carried.forward(ids, trace="*.topk_idx", **logits_only).tensors
    for name, chosen in other.items():
        assert (result.tensors[name] == chosen).all(), "rounding decides a tie: draw another seed"
    worst = 0.0
    for name, gradient in one.backward(result).items():
        direction = rng.standard_normal(gradient.shape)
        stepped = weights | {name: weights[name] + 1j * STEP * direction}
        derivative = complex_loss(cfg, choices, stepped, ids, more).imag / STEP
        terms = gradient * direction
        size = np.sqrt((terms**2).sum())
        worst = max(worst, abs(terms.sum() - derivative) / max(size, FLOOR))
    return worst


# The losses are about 3.  Gradients below this are compared absolutely: that of a gate whose single weight is
# normalised to a constant is rounding around zero.
FLOOR = 1e-3


@settings(max_examples=40)
@given(configurations(), st.sampled_from(sorted(PROFILES)), st.integers(0, 10**6))
def test_all_gradients_are_those_of_the_complex_step(cfg: ModelConfig, profile: str, seed: int) -> None:
    choices = Choices.named(profile)
    if cfg.has_selection_bias:
        try:
            choices.group_score_count(cfg)
        except refimpl.Error:
            assume(False)
    assert worst_error(cfg, choices, seed) <= TOLERANCE


@pytest.mark.parametrize(
    "more",
    [
        {"segment_ids": [[0, 0, 1, 1, 1], [3, 3, 3, -1, -1]]},
        {"mask": [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]},
        {"position_ids": [[4, 5, 9, 10, 11], [0, 2, 4, 6, 8]]},
        {"routing": {1: np.tile([1, 6, 3], (2, 5, 1))}},
        {"routing": {1: (np.tile([1, 6, 3], (2, 5, 1)), np.linspace(-1, 1, 30).reshape(2, 5, 3))}},
        {"labels": None, "targets": [[3, -100, 4, 5, 6], [-100, 1, 1, 1, -100]]},
    ],
    ids=["packed", "masked", "positions", "experts given", "weights given", "targets"],
)
def test_gradients_with_other_inputs_are_those_of_the_complex_step(more: dict[str, Any]) -> None:
    assert worst_error(config(), Choices(), 3, more) <= TOLERANCE


def test_the_cotangent_of_any_tensor_has_the_gradient_of_the_complex_step() -> None:
    """<cotangent, tensor> for every floating-point tensor of a trace, with respect to all weights at once."""
    cfg, seed = config(), 5
    weights, ids = random_weights(cfg, seed), random_ids(cfg, (2, 4), seed)
    one, rng = model(cfg, seed), np.random.default_rng(seed)
    result = one.forward(ids)
    direction = {k: rng.standard_normal(w.shape) if "bias" not in k else 0.0 for k, w in weights.items()}
    stepped = {k: w + 1j * STEP * direction[k] for k, w in weights.items()}
    carried = Model(cfg, DictWeights(cfg, stepped), COMPLEX, Choices(), DEEPSEEK_V3).forward(ids).tensors
    tried = 0
    for name, tensor in result.tensors.items():
        if tensor.dtype.kind != "f" or name.rpartition(".")[2] in TAKES_NONE:
            continue
        cotangent = rng.standard_normal(tensor.shape)
        gradients = one.backward(result, {name: cotangent})
        derivative = (carried[name].imag * cotangent).sum() / STEP
        terms = np.concatenate([(g * direction[k]).reshape(-1) for k, g in gradients.items()])
        assert abs(terms.sum() - derivative) <= TOLERANCE * np.sqrt((terms**2).sum()), name
        tried += 1
    assert tried > 40


TAKES_NONE = {"scores", "slots"}  # attention's scores have -inf; slots are per expert
