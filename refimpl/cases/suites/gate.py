"""Suite gate: who goes where, and with which weight.  SPEC ROUTE-1 to ROUTE-9.

Free cases compare sets of experts where the margin decides; their backward twins have the routing as an
input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.cases.definition import SEED, Definition, Draw, Given, Integers, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

_V3 = ("ROUTE-1", "ROUTE-2", "ROUTE-3", "ROUTE-4", "ROUTE-5", "ROUTE-6", "ROUTE-7")
_BIAS = "e_score_correction_bias"
_D512 = shaped(V3, hidden_size=512)
_V2 = shaped(
    preset("deepseek-v2"), num_hidden_layers=4, num_attention_heads=2, vocab_size=64, hidden_size=512
)
_LITE = shaped(
    preset("deepseek-v2-lite"), num_hidden_layers=4, num_attention_heads=2, vocab_size=64, hidden_size=512
)


def _gate(id: str, title: str, config: ModelConfig, tokens: int = 48, **more: Any) -> tuple[Definition, ...]:
    wide = config.hidden_size
    return pair(
        f"gate/{id}",
        title,
        more.pop("clauses", _V3),
        "gate",
        config,
        {"x": more.pop("x", Draw((tokens, wide)))},
        dy=(tokens, config.num_experts_per_tok),
        backward_clauses=("ROUTE-8", "ROUTE-9"),
        forced=True,
        path=f"{LAYER}.mlp.gate",
        **more,
    )


def _bias(mean: float, step: int) -> Draw:
    """A selection bias around `mean` with a deviation of about 2^(6.7 + step), exact in float32 and not in
    bf16."""
    return Draw((256,), 2.0**step, 1, mean + 2.0**-18, "F32")


def _paired() -> Given:
    """Router weights of which every second row is there twice: some tokens have a tie at the cut."""
    rows = generator.tensor(SEED, "gate/ties rows", (171, 64), 2.0**-9)
    return Given(np.repeat(rows, np.arange(171) % 2 + 1, axis=0)[:256])


def _rising() -> Array:
    """(15, 64) positive rows of rising size, from 0.5 to 7.5: a bf16 logit near -60 is off by an eighth."""
    steps = generator.integers(SEED, "gate/far-below rows", (15, 64), 0, 8)
    return np.asarray((8 * np.arange(1, 16)[:, None] + steps) * 2.0**-4)


_V3_FLAGS = (
    flags.GROUP_SCORE_MAX,
    flags.GROUP_UNBIASED,
    flags.NORM_TOPK,
    flags.BIAS_IN_WEIGHTS,
    flags.SCALING,
)

CASES: tuple[Definition, ...] = (
    _gate(
        "wide",
        "256 experts in 8 groups, the best 8 of the best 4 groups, at the hidden width 7168",
        V3,
        flags=_V3_FLAGS,
    )[0],
    *_gate(
        "v3",
        "256 experts in 8 groups, the best 8 of the best 4 groups",
        _D512,
        flags=_V3_FLAGS,
    ),
    *_gate(
        "bias-12",
        "A selection bias near 12, whose differences bfloat16 cannot hold",
        _D512,
        weights={_BIAS: _bias(12.0, -11)},
        flags=(flags.BIAS_ROUNDED, flags.BIAS_IN_WEIGHTS, flags.BIAS_BEFORE_SIGMOID),
    ),
    *_gate(
        "bias-negative",
        "A selection bias near -1.1: all biased scores are negative",
        _D512,
        weights={_BIAS: _bias(-1.125, -10)},
        flags=(flags.ZERO_MASK,),
    ),
    *_gate(
        "tiny-scores",
        "Logits near -16: the chosen scores sum to about 1e-6, and the bias does the choosing",
        shaped(V3, hidden_size=128),
        x=Integers((48, 128), 64, 192, 2.0**-7),
        weights={"weight": Integers((256, 128), -192, -64, 2.0**-10)},
        flags=(flags.NORM_FLOOR,),
    ),
    *_gate(
        "far-below",
        "Logits from -4 to -60: sums of chosen scores above and far below every epsilon",
        shaped(V3, hidden_size=64),
        tokens=15,
        x=Given(_rising()),
        weights={"weight": Integers((256, 64), -192, -64, 2.0**-10)},
        flags=(flags.NORM_FLOOR,),
    ),
    *_gate(
        "few",
        "64 experts in 8 groups, the best 6 of the best 4 groups",
        shaped(_D512, n_routed_experts=64, num_experts_per_tok=6),
        flags=_V3_FLAGS,
    ),
    *_gate(
        "ties",
        "Experts with equal router weights and no bias: the lower index wins, and both answers pass",
        shaped(V3, hidden_size=64),
        x=Draw((48, 64)),
        weights={"weight": _paired(), _BIAS: Given(np.zeros(256), "F32")},
        flags=(flags.TIE_ORDER,),
    ),
    *_gate(
        "unnormalised",
        "norm_topk_prob off: the scores themselves, scaled",
        shaped(_D512, norm_topk_prob=False),
        flags=(flags.NORM_TOPK, flags.SCALING),
    ),
    *_gate(
        "single",
        "One expert per token: its normalised weight is the scaling factor, without a gradient",
        shaped(_D512, num_experts_per_tok=1),
        flags=(flags.NORM_TOPK,),
    ),
    *_gate(
        "ungrouped",
        "All 256 experts in one group",
        shaped(_D512, n_group=1, topk_group=1),
        flags=(flags.GROUP_SCORE_MAX,),
    ),
    *_gate(
        "v2-groups",
        "V2: softmax, groups by their largest score, no bias, no normalisation, factor 16",
        _V2,
        flags=(flags.SOFTMAX_AFTER_MASK, flags.NORM_TOPK, flags.SCALING),
    ),
    *_gate("v2-greedy", "V2-Lite: softmax and the 6 best of 64 experts", _LITE, flags=(flags.NORM_TOPK,)),
)
