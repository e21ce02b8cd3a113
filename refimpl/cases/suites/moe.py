"""Suite moe: routed experts, shared experts, and all of it together.  SPEC MOE-1 to MOE-5."""

from dataclasses import replace

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.config.presets import preset

_PATH = f"{LAYER}.mlp"
_NARROW = shaped(V3, hidden_size=128, moe_intermediate_size=32)
_FEW = shaped(V3, hidden_size=64, moe_intermediate_size=16)
_V2 = shaped(
    preset("deepseek-v2"), num_hidden_layers=4, num_attention_heads=2, vocab_size=64, hidden_size=64,
    moe_intermediate_size=16,
)  # fmt: skip
_EXPERTS = shaped(_FEW, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
_IDX = np.array([[5, 0, 15], [5, 1, 0], [5, 15, 2], [5, 2, 1], [5, 0, 3], [3, 5, 15]])  # 5 always, most never
_CLAUSES = ("MOE-1", "MOE-2", "MOE-5", "ROUTE-6", "ROUTE-7")
_FLAGS = (flags.SCALING, flags.SHARED_DROPPED, flags.SWIGLU_SWAPPED)

_FEW_TOKENS = pair(
    "moe/v3-few",
    "256 experts, 8 per token, and a shared expert, on 3 tokens",
    _CLAUSES,
    "moe",
    _FEW,
    {"x": Draw((3, 64))},
    dy=(3, 64),
    backward_clauses=("MOE-3", "MOE-4", "ROUTE-8", "ROUTE-9"),
    forced=True,
    path=_PATH,
    flags=_FLAGS,
)
CASES: tuple[Definition, ...] = (
    *pair(
        "moe/experts",
        "Experts for given ids and weights: one with every token, many with none",
        ("MOE-1", "MOE-2"),
        "experts",
        _EXPERTS,
        {"x": Draw((6, 64)), "topk_idx": Given(_IDX, "I64"), "topk_weight": Draw((6, 3), 2.0**-8)},
        dy=(6, 64),
        backward_clauses=("MOE-3", "MOE-4"),
        path=f"{_PATH}.experts",
    ),
    Definition(
        "moe/v3",
        "256 experts in 8 groups, 8 per token, and a shared expert, on 24 tokens",
        _CLAUSES,
        "moe",
        _NARROW,
        {"x": Draw((24, 128))},
        path=_PATH,
        flags=_FLAGS,
    ),
    replace(_FEW_TOKENS[1], twin=None),  # its forward is that of moe/v3
    *pair(
        "moe/v2",
        "V2: 160 experts, 6 of 3 groups, two shared experts, factor 16",
        _CLAUSES,
        "moe",
        _V2,
        {"x": Draw((3, 64))},
        dy=(3, 64),
        backward_clauses=("MOE-3", "MOE-4", "ROUTE-8", "ROUTE-9"),
        forced=True,
        path=_PATH,
        flags=_FLAGS,
    ),
)
