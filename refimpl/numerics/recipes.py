"""The ready recipes, row by row.  SPEC RECIPE-3, RECIPE-9 to RECIPE-13.

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
_DECODING: Final = (
    _row("cache.*", CARRIER, "modelled", "a row is kept as it was used"),
    _row("attention.partial", CARRIER, "modelled", "parts of the keys are merged as they were accumulated"),
    _row("attention.lse", CARRIER, "modelled", "parts of the keys are merged as they were accumulated"),
)
_FUSED: Final = _row("fused.*", CARRIER, "modelled", "inside of one kernel nothing is stored")

BF16: Final = Recipe(
    "bf16",
    (
        _FUSED,
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
        *_DECODING,
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


def _fp8(name: str, scale: str) -> Recipe:
    """V3's training.  scale: the rule for scales, but for those of what is dispatched and of the input of
    o_proj, which are powers of two in any case."""
    across: dict[str, Any] = {"tile": "1x128", "scale": scale}
    along: dict[str, Any] = {"tile": "128x1", "scale": scale}
    power: dict[str, Any] = {"tile": "1x128", "scale": "ue8m0"}
    power_along: dict[str, Any] = {"tile": "128x1", "scale": "ue8m0"}
    again = f"{_R323}: RMSNorm is computed again in backward"
    up_again = f"{_R323}: the up-projections of MLA are computed again in backward"
    silu_again = f"{_R333}: the output of SwiGLU is computed again in backward"
    return Recipe(
        name,
        (
            _FUSED,
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
                "both tilings are made of one gradient",
                of="source",
                **along,
            ),
            _row("*.dy", "e4m3", "recorded", f"{_R332}: tiles of 1x128, E4M3 for gradients too", **across),
            # Weights, and how products add up.
            _row("*.weight", "e4m3", "recorded", f"{_R332}: blocks of 128x128", tile="128x128", scale=scale),
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
            *_DECODING,
            _row("*", "bf16", "recorded", f"{_R331}: activations between operators are BF16"),
        ),
    )


V3_FP8: Final = _fp8("v3-fp8", "ieee")
V31_UE8M0: Final = _fp8("v3.1-ue8m0", "ue8m0")


def _is(site: str, format: str, does: str, **more: Any) -> Rule:
    """What transformers does at a site."""
    return _row(site, format, "recorded", f"{_HF}: {does}", **more)


HF_BF16: Final = Recipe(
    "hf-bf16",
    (
        _is("fused.rope.frequency", "fp32", "frequencies are computed in float32"),
        _is("fused.rope.angle", "fp32", "angles are computed in float32"),
        _is("fused.attention.softmax", "fp32", "softmax in float32"),
        _is("fused.gate.sum", "fp32", "the router runs in float32"),
        _is("fused.experts.slot", "fp32", "bfloat16 times a float32 weight (grouped_mm)"),
        _is("fused.experts.sum", CARRIER, "a sum in float32 over the chosen experts (grouped_mm)"),
        _is("fused.d.experts.sum", "bf16", "index_put adds rows in bfloat16, in the order of experts"),
        _is("fused.d.moe.in", "bf16", "autograd adds shared experts, routed experts, router in this order"),
        _is("fused.grad.products", "bf16", "the gain's gradient is a product in bfloat16, then summed"),
        _is("fused.grad.rows", "bf16", "the embedding's gradient adds a token at a time in bfloat16"),
        _is("fused.*", "bf16", "every operator stores its result"),
        _is("norm.normed", "bf16", "cast before the gain; autograd reads it as it was before", of="source"),
        _is("attention.probs", "bf16", "softmax cast to bfloat16; autograd reads it before", of="source"),
        _is("rope.table", "bf16", "cos and sin are cast to the input's dtype"),
        _is("d.gate.in", "bf16", "the router's input was cast to float32"),
        _is("d.gate.*", "fp32", "the router runs in float32"),
        _is("gate.*", "fp32", "the router runs in float32"),
        _is("experts.gate_proj.dx", CARRIER, "gate_up_proj is one product, contracted over both"),
        _is("experts.up_proj.dx", CARRIER, "gate_up_proj is one product, contracted over both"),
        _is("grad", "bf16", "gradients have the dtype of the weights"),
        _is("optim.bias", "fp32", "e_score_correction_bias stays in float32"),
        _row("optim.*", "bf16", "modelled", "torch's AdamW keeps everything in the dtype of the weights"),
        *_PRODUCTS,
        *_DECODING,
        _is("*", "bf16", "every operator stores its result"),
    ),
)

_DEMO: Final = "DeepSeek's inference/model.py"


def _demo(name: str, scale_format: str) -> Recipe:
    """DeepSeek's inference code with gemm_impl = "fp8" and attn_impl = "naive".  scale_format: the row of
    scales where it hands `scale_fmt` on, which is in plain Linear only: q_a, kv_a and routed experts."""
    tiles: dict[str, Any] = {"tile": "1x128", "scale": "triton_v3"}
    plain: dict[str, Any] = {"tile": "1x128", "scale": scale_format}
    act = f"{_DEMO}: act_quant of every input of an FP8 linear"
    passed = f"{act}; scale_fmt is handed on"
    own = "backward is not in this code: BF16, on the weights as numbers"
    return Recipe(
        name,
        (
            *_OPTIMISER,
            _row("fused.rope.frequency", "fp32", "recorded", f"{_DEMO}: frequencies in float32"),
            _row("fused.rope.angle", "fp32", "recorded", f"{_DEMO}: angles in float32"),
            _row("fused.rope.product", CARRIER, "recorded", f"{_DEMO}: a complex product in float32"),
            _row("fused.attention.products", "bf16", "recorded", f"{_DEMO}: einsum in bfloat16"),
            _row("fused.attention.softmax", "fp32", "recorded", f"{_DEMO}: softmax in float32"),
            _row("fused.swiglu.silu", "bf16", "recorded", f"{_DEMO}: F.silu stores its result"),
            _row("fused.*experts.swiglu.silu", "bf16", "recorded", f"{_DEMO}: F.silu stores its result"),
            _row("fused.gate.sum", "bf16", "recorded", f"{_DEMO}: a sigmoid gate stays in bfloat16"),
            _row("fused.experts.slot", "bf16", "recorded", f"{_DEMO}: routing weights are bfloat16"),
            _row(
                "fused.experts.sum", "bf16", "recorded", f"{_DEMO}: y[idx] += in bfloat16, expert by expert"
            ),
            _row("fused.*", CARRIER, "modelled", own),
            _row("d.*", "bf16", "modelled", own),
            _row("norm.normed", CARRIER, "recorded", f"{_DEMO}: F.rms_norm stores its result alone"),
            _row("rope.table", "fp32", "recorded", f"{_DEMO}: freqs_cis is complex64"),
            _row("gate.choice", "fp32", "recorded", f"{_DEMO}: the bias is float32"),
            _row("gate.*", "bf16", "recorded", f"{_DEMO}: linear and sigmoid in bfloat16"),
            *_unscaled("eh_proj", "bf16 in the published checkpoint"),
            *_unscaled("lm_head", f"{_DEMO}: the head has the default dtype"),
            _row("eh_proj.in", "bf16", "recorded", "bf16 in the published checkpoint"),
            _row("lm_head.in", "bf16", "recorded", f"{_DEMO}: the head has the default dtype"),
            _row("self_attn.in", "e4m3", "recorded", passed, keep="codes", **plain),
            _row("experts.in", "e4m3", "recorded", passed, keep="codes", **plain),
            _row("experts.down_proj.in", "e4m3", "recorded", passed, keep="codes", **plain),
            *(_row(site, "bf16", "modelled", "a value that is saved") for site in ("norm.in", "rope.in")),
            _row("*.in.fprop", CARRIER, "recorded", act),
            _row("*.in.wgrad", CARRIER, "modelled", own),
            _row("*.in", "e4m3", "recorded", act, keep="codes", **tiles),
            _row("*.dy*", "bf16", "modelled", own),
            _row(
                "*.weight",
                "e4m3",
                "recorded",
                f"{_DEMO}: the checkpoint's codes; others are quantised so",
                tile="128x128",
                scale="w_block",
            ),
            _row(
                "*.fprop",
                "fp32",
                "recorded",
                "kernel.py: fp8_gemm; tiles of 16 or 32 rows would be triton_mma, the autotuner decides",
                accumulator="triton_wgmma",
            ),
            *(
                _row(f"*.{gemm}", CARRIER, "modelled", own, accumulator="exact")
                for gemm in ("dgrad", "wgrad")
            ),
            *_DECODING,
            _row("*", "bf16", "recorded", f"{_DEMO}: every operator stores its result in bfloat16"),
        ),
    )


OFFICIAL: Final = _demo("official-inference", "triton_v3")
OFFICIAL_V31: Final = _demo("official-inference-v3.1", "triton_v3_ue8m0")

RECIPES: Final = {
    recipe.name: recipe for recipe in (BF16, V3_FP8, V31_UE8M0, HF_BF16, OFFICIAL, OFFICIAL_V31)
}
SHORT: Final = {"fp8": "v3-fp8"}
