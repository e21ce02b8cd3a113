"""What the fields of a configuration must satisfy together.  SPEC CONF-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from refimpl.config.rules import Rule, integer, only, real, show
from refimpl.errors import Invalid, Missing, Unsupported

if TYPE_CHECKING:
    from refimpl.config.model import ModelConfig

# Fields with one value that is computed here; another value changes the function, so it is refused.
FIXED: dict[str, Rule] = {
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
}


def check_ignored(c: ModelConfig) -> None:
    """Fields that are not needed may not contradict those that are."""
    given = {name: value for name, value in c.ignored.items() if value is not None}
    for name, rule in FIXED.items():
        if name in given:
            rule.settle(f"config field {name}", given[name])
    for name in ("num_key_value_heads", "qk_head_dim"):
        if name in given:
            integer().settle(f"config field {name}", given[name])
    if given.get("num_key_value_heads", c.num_attention_heads) != c.num_attention_heads:
        raise Unsupported(
            f"config field num_key_value_heads is {show(given['num_key_value_heads'])}, "
            f"but it must equal num_attention_heads ({c.num_attention_heads}), as in latent attention."
        )
    if given.get("qk_head_dim", c.qk_head_dim) != c.qk_head_dim:
        raise Invalid(
            f"config field qk_head_dim is {show(given['qk_head_dim'])}, "
            f"but it must be qk_nope_head_dim + qk_rope_head_dim ({c.qk_head_dim})."
        )
    if (
        real(strict=False).settle("config field attention_dropout", given.get("attention_dropout", 0.0))
        != 0.0
    ):
        raise Unsupported(
            f"config field attention_dropout is {show(given['attention_dropout'])}, but it must be 0."
        )


def check_quantization(given: Any) -> None:
    if not isinstance(given, Mapping):
        raise Invalid(f"config field quantization_config is {show(given)}, but it must be an object or null.")
    block = given.get("weight_block_size", [128, 128])
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise Invalid(
            f"config field quantization_config: weight_block_size is {show(block)}, "
            f"but it must be two integers."
        )
    for side in block:
        integer().settle("config field quantization_config: weight_block_size", side)


def check_combinations(c: ModelConfig) -> None:
    if c.qk_rope_head_dim % 2:
        raise Invalid(f"config field qk_rope_head_dim is {c.qk_rope_head_dim}, but it must be even.")
    if c.topk_method != "greedy":
        for name, value in (("n_group", c.n_group), ("topk_group", c.topk_group)):
            if value is None:
                raise Invalid(
                    f'config field {name} is null, but topk_method "{c.topk_method}" must have an integer.'
                )
    if c.n_routed_experts % c.groups:
        raise Invalid(
            f"config field n_routed_experts is {c.n_routed_experts}, "
            f"but it must be a multiple of n_group ({c.groups})."
        )
    if c.kept_groups > c.groups:
        raise Invalid(
            f"config field topk_group is {c.kept_groups}, but it must be at most n_group ({c.groups})."
        )
    if c.num_experts_per_tok > c.kept_groups * c.experts_per_group:
        raise Invalid(
            f"config field num_experts_per_tok is {c.num_experts_per_tok}, "
            f"but it must be at most the experts of the kept groups "
            f"({c.kept_groups} groups of {c.experts_per_group})."
        )
    if c.topk_method == "noaux_tc" and c.kept_groups < c.groups and c.experts_per_group < 2:
        raise Invalid(
            f"config fields n_routed_experts and n_group give groups of {c.experts_per_group} expert, "
            f'but the group score of topk_method "noaux_tc" must have at least 2.'
        )
    if c.has_indexer:
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            if getattr(c, name) is None:
                raise Missing(f'config field {name} is missing, but model_type "deepseek_v32" must have it.')
