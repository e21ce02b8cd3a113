"""Suite block: one decoder layer.  SPEC BLOCK-1."""

from refimpl.cases.definition import Definition, Draw, shaped
from refimpl.cases.suites.common import V3, pair

_NARROW = shaped(
    V3, hidden_size=128, intermediate_size=256, moe_intermediate_size=32, n_routed_experts=32, n_group=8,
    q_lora_rank=192, kv_lora_rank=64,
)  # fmt: skip

CASES: tuple[Definition, ...] = (
    *pair(
        "block/dense",
        "A layer with a dense MLP",
        ("BLOCK-1",),
        "block",
        _NARROW,
        {"x": Draw((2, 6, 128))},
        dy=(2, 6, 128),
        path="model.layers.0",
        arguments={"layer": 0},
    ),
    *pair(
        "block/experts",
        "A layer with 32 experts in 8 groups",
        ("BLOCK-1",),
        "block",
        _NARROW,
        {"x": Draw((2, 6, 128))},
        dy=(2, 6, 128),
        forced=True,
        path="model.layers.3",
        arguments={"layer": 3},
    ),
)
