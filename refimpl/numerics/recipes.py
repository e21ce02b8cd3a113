"""The ready recipes, row by row.  SPEC RECIPE-3, RECIPE-8 to RECIPE-12.

A row says what happens at its sites; the first row that fits a site counts.  `recorded`: seen in code, on
hardware or stated by the report.  `modelled`: an assumption of ours, with what it rests on.
"""

from __future__ import annotations

from typing import Any, Final

from refimpl.numerics.recipe import CARRIER, Recipe, Rule

_HF = "transformers modeling_deepseek_v3.py"
_R331, _R332, _R333 = "report section 3.3.1", "report section 3.3.2", "report section 3.3.3"
_R323 = "report section 3.2.3"


def _row(site: str, format: str, evidence: str, source: str, **more: Any) -> Rule:
    return Rule(site, format, evidence, source, **more)


_OPTIMISER: Final = (
    _row("optim.moment*", "bf16", "recorded", f"{_R333}: moments in BF16"),
    _row("optim.weight", "bf16", "recorded", "every weight is read in bfloat16"),
    _row("optim.*", "fp32", "recorded", f"{_R333}: master weights in FP32"),
    _row("grad", "fp32", "recorded", f"{_R333}: gradients are accumulated in FP32"),
)
_PRODUCTS: Final = (  # of a recipe without codes
    _row("*.in.*", CARRIER, "recorded", "every GEMM reads the same operand"),
    _row("*.dy.wgrad", CARRIER, "recorded", "every GEMM reads the same operand"),
    _row("*.weight", CARRIER, "recorded", "weights are read as they are stored"),
    _row("*.fprop", CARRIER, "modelled", "an accumulator as wide as need be", accumulator="exact"),
    _row("*.dgrad", CARRIER, "modelled", "an accumulator as wide as need be", accumulator="exact"),
    _row("*.wgrad", CARRIER, "modelled", "an accumulator as wide as need be", accumulator="exact"),
)

BF16: Final = Recipe(
    "bf16",
    (
        _row("gate.*", "fp32", "recorded", f"{_HF}: the router runs in float32"),
        _row("d.gate.*", "fp32", "recorded", f"{_HF}: the router runs in float32"),
        _row("attention.scores", "fp32", "modelled", f"{_R331}: attention keeps high precision"),
        _row("d.attention.scores", "fp32", "modelled", _R331),
        _row("rope.table", "bf16", "recorded", f"{_HF}: cos and sin are cast to the input's dtype"),
        _row("norm.normed", "bf16", "recorded", f"{_HF}: cast before the gain"),
        _row("lm_head.out", "fp32", "modelled", "the loss is taken in float32"),
        _row("d.logits", "bf16", "modelled", "the gradient that enters the head's Dgrad and Wgrad"),
        *_OPTIMISER,
        *_PRODUCTS,
        _row("*", "bf16", "recorded", "every activation is stored in bfloat16"),
    ),
)


def _unscaled(own: str, why: str) -> tuple[Rule, ...]:
    """The rows of a linear that stays in BF16."""
    rest = (f"{own}.in.*", f"{own}.dy.wgrad", f"{own}.weight")
    products = (f"{own}.fprop", f"{own}.dgrad", f"{own}.wgrad")
    return (
        _row(f"{own}.dy", "bf16", "recorded", why),
        *(_row(site, CARRIER, "recorded", why) for site in rest),
        *(_row(site, CARRIER, "recorded", why, accumulator="exact") for site in products),
    )


def _fp8(name: str, dispatched: str, other: str, blocks: str, why: str) -> Recipe:
    """V3's training, with three rules for scales: of what is dispatched and of the input of o_proj, of other
    activations and gradients, and of weights."""
    across: dict[str, Any] = {"tile": "1x128", "scale": other}
    along: dict[str, Any] = {"tile": "128x1", "scale": other}
    power: dict[str, Any] = {"tile": "1x128", "scale": dispatched}
    power_along: dict[str, Any] = {"tile": "128x1", "scale": dispatched}
    again = f"{_R323}: RMSNorm is computed again in backward"
    up_again = f"{_R323}: the up-projections of MLA are computed again in backward"
    silu_again = f"{_R333}: the output of SwiGLU is computed again in backward"
    return Recipe(
        name,
        (
            *_OPTIMISER,
            _row("d.gate.*", "fp32", "recorded", f"{_R331}: the gate keeps its precision"),
            _row("d.attention.scores", "fp32", "modelled", f"{_R331}: attention keeps high precision"),
            _row("d.*", "bf16", "modelled", "what passes between operators backward is BF16, as forward"),
            _row("gate.in", "bf16", "recorded", again, keep="recomputed"),
            _row("gate.*", "fp32", "recorded", f"{_R331}: the gate keeps its precision"),
            _row("lm_head.in", "bf16", "recorded", again, keep="recomputed"),
            _row("eh_proj.in", "bf16", "recorded", f"bf16 in the checkpoint; {again}", keep="recomputed"),
            *_unscaled("lm_head", f"{_R331}: the output head keeps its precision"),
            *_unscaled("eh_proj", "bf16 in the published checkpoint"),
            _row("lm_head.out", "fp32", "modelled", "the loss is taken in float32"),
            # The input of linears: what is kept, what Fprop reads, what Wgrad reads.
            _row("o_proj.in", "e5m6", "recorded", f"{_R333}: E5M6 with powers of two", keep="codes", **power),
            _row("o_proj.in.fprop", "e4m3", "modelled", "no tensor core takes 12 bits", **power),
            _row("o_proj.in.wgrad", "e4m3", "modelled", "no tensor core takes 12 bits", **power_along),
            _row("experts.in", "e4m3", "recorded", f"{_R333}: dispatched as codes", keep="codes", **power),
            _row("experts.in.wgrad", "e4m3", "modelled", "powers of two along tokens too", **power_along),
            _row("self_attn.in", "e4m3", "recorded", again, keep="recomputed", **across),
            _row("q_b_proj.in", "e4m3", "recorded", again, keep="recomputed", **across),
            _row("kv_b_proj.in", "e4m3", "recorded", again, keep="recomputed", **across),
            _row("mlp.in", "e4m3", "recorded", again, keep="recomputed", **across),
            _row("shared_experts.in", "e4m3", "recorded", again, keep="recomputed", **across),
            _row("*experts.down_proj.in", "e4m3", "recorded", silu_again, keep="recomputed", **across),
            _row("*.in.fprop", CARRIER, "recorded", f"{_R332}: what is kept is what Fprop read"),
            _row("*.in.wgrad", "e4m3", "recorded", "report section 3.5.2: dequantised, then 128x1", **along),
            _row("norm.in", "bf16", "recorded", again),
            _row("rope.in", "bf16", "recorded", up_again),
            _row("*.in", "e4m3", "recorded", f"{_R332}: tiles of 1x128", keep="codes", **across),
            # Gradients.
            _row("experts.down_proj.dy", "e4m3", "recorded", f"{_R333}: dispatched as codes", **power),
            _row("experts.down_proj.dy.wgrad", "e4m3", "modelled", "what was dispatched", **power_along),
            _row(
                "*.dy.wgrad",
                "e4m3",
                "modelled",
                "both tilings are made of one BF16 gradient",
                of="source",
                **along,
            ),
            _row("*.dy", "e4m3", "recorded", f"{_R332}: tiles of 1x128, E4M3 for gradients too", **across),
            # Weights, and how products add up.
            _row("*.weight", "e4m3", "recorded", f"{_R332}: blocks of 128x128", tile="128x128", scale=blocks),
            *(
                _row(f"*.{gemm}", "fp32", "recorded", f"{_R332}: promoted every 128", accumulator="deepgemm")
                for gemm in ("fprop", "dgrad", "wgrad")
            ),
            # What attention and SwiGLU keep.
            _row(
                "*experts.swiglu.gate", "e4m3", "recorded", f"{_R333}: cached in FP8", keep="codes", **across
            ),
            _row("*experts.swiglu.up", "e4m3", "recorded", f"{_R333}: cached in FP8", keep="codes", **across),
            _row("attention.query", "bf16", "recorded", up_again, keep="recomputed"),
            _row("attention.key", "bf16", "recorded", up_again, keep="recomputed"),
            _row("attention.value", "bf16", "recorded", up_again, keep="recomputed"),
            _row("attention.probs", "bf16", "modelled", "fused attention keeps none", keep="recomputed"),
            _row("attention.scores", "fp32", "modelled", f"{_R331}: attention keeps high precision"),
            _row("*", "bf16", "recorded", f"{_R331}: {why}"),
        ),
    )


V3_FP8: Final = _fp8("v3-fp8", "ue8m0", "ieee", "ieee", "activations between operators are BF16")
V31_UE8M0: Final = _fp8("v3.1-ue8m0", "ue8m0", "ue8m0", "ue8m0", "activations between operators are BF16")

RECIPES: Final = {recipe.name: recipe for recipe in (BF16, V3_FP8, V31_UE8M0)}
SHORT: Final = {"fp8": "v3-fp8"}
