"""Suite recipe: components in the arithmetic of V3's training, GEMM by GEMM.  SPEC RECIPE-5 to -7.

Cases of a recipe: CASE-17.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from refimpl.cases.definition import Definition, Draw, Source, shaped, usual
from refimpl.cases.staged import Staged
from refimpl.cases.suites.common import LAYER, V3
from refimpl.cases.suites.warm import gains, learned, moments, tokens
from refimpl.checkpoint import names
from refimpl.config.model import ModelConfig

RECIPES: Final = ("v3-fp8", "v3.1-ue8m0")

# Widths that are several tiles, and 192 rows of kv_a, of which the last block is not whole.
_SMALL: Final = shaped(
    V3,
    hidden_size=384,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    num_attention_heads=4,
    moe_intermediate_size=256,
    intermediate_size=512,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
)
_BLOCKS: Final = 4  # magnitudes of tiles and blocks, so that no scale is as good as another
_TOKENS: Final = 136  # two tiles of tokens, the second of them short


def _cases(
    name: str,
    title: str,
    component: str,
    path: str,
    inputs: dict[str, Source],
    dy: tuple[int, ...],
    config: ModelConfig = _SMALL,
    recipes: tuple[str, ...] = RECIPES,
    **more: Any,
) -> tuple[Staged, ...]:
    return tuple(
        Staged(
            Definition(
                f"recipe/{name}-{recipe}",
                f"{title}, forward and backward in {recipe}",
                ("RECIPE-5", "RECIPE-6", "RECIPE-7"),
                component,
                config,
                {**inputs, "dy": Draw(dy, blocks=_BLOCKS)},
                path=path,
                weights=_weights(config, path),
                backward=True,
                **more,
            ),
            recipe,
        )
        for recipe in recipes
    )


def _weights(config: ModelConfig, path: str) -> dict[str, Source]:
    """The linears below a path, by name below it, with blocks of different magnitudes."""
    prefix = f"{path}." if path else ""
    found: dict[str, Source] = {}
    for name, spec in names.parameters(config).items():
        source = usual(spec)
        if name.startswith(prefix) and spec.role == "linear" and isinstance(source, Draw):
            found[name.removeprefix(prefix)] = replace(source, blocks=_BLOCKS)
    return found


def _step() -> Staged:
    """A step of a model with one dense layer and one with experts, from warm moments."""
    config = shaped(
        _SMALL,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        hidden_size=128,
        q_lora_rank=128,
        num_attention_heads=2,
        moe_intermediate_size=128,
        intermediate_size=128,
        n_routed_experts=2,
        n_group=1,
        num_experts_per_tok=1,
    )
    definition = Definition(
        "recipe/step-v3-fp8",
        "One step from warm moments, with the routing given, in v3-fp8",
        ("RECIPE-5", "STEP-2"),
        "step",
        config,
        {**tokens("recipe/step-v3-fp8", (1, 2, 12), config), **moments(learned(config))},
        weights={**_weights(config, ""), **gains(config)},
        arguments={"training": {"learning_rate": 0.01, "warmup_steps": 20}, "steps": 12},
        required=("gradient_norm", "loss.*", "after.*"),
        forced=True,
    )
    return Staged(definition, "v3-fp8")


CASES: Final = (
    *_cases(
        "linear",
        "One linear, three GEMMs",
        "linear",
        f"{LAYER}.self_attn.kv_a_proj_with_mqa",
        {"x": Draw((_TOKENS, 384), blocks=_BLOCKS)},
        (_TOKENS, 192),
    ),
    *_cases(
        "expert",
        "One routed expert, its SwiGLU computed again from FP8",
        "mlp",
        f"{LAYER}.mlp.experts.3",
        {"x": Draw((_TOKENS, 384), blocks=_BLOCKS)},
        (_TOKENS, 384),
    ),
    *_cases(
        "mla",
        "Latent attention, its up-projections computed again, E5M6 before o_proj",
        "mla",
        f"{LAYER}.self_attn",
        {"x": Draw((2, 20, 384), blocks=_BLOCKS)},
        (2, 20, 384),
    ),
    *_cases(
        "moe",
        "Gate, routed and shared experts, with the routing given",
        "moe",
        f"{LAYER}.mlp",
        {"x": Draw((40, 384), blocks=_BLOCKS)},
        (40, 384),
        recipes=RECIPES[:1],
        forced=True,
    ),
    _step(),
)
