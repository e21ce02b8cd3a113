"""The boundaries at which values are rounded, by name.  SPEC RECIPE-2.

A site is a place where a real system stores a tensor, sends it, or feeds it to a GEMM.  A linear's sites
begin with its own name, and those inside of experts with `experts.` or `shared_experts.`: a recipe may
treat these otherwise than a dense MLP.
"""

from __future__ import annotations

from typing import Final

VALUES: Final = {
    "embed.out": "rows of the embedding",
    "norm.normed": "x / rms, before the gain",
    "norm.out": "output of an RMSNorm",
    "*.in": "the input of linears, read by Fprop and Wgrad",
    "*.out": "the output of a linear",
    "*.dy": "the incoming gradient of a linear, read by Dgrad and Wgrad",
    "*.dx": "the outgoing gradient of a linear",
    "rope.table": "cos and sin",
    "rope.out": "rotated query and key parts",
    "attention.query": "the query, which some scale and store before the product",
    "attention.scores": "scaled query-key products",
    "attention.probs": "softmax of the scores",
    "attention.out": "heads' outputs",
    "gate.in": "the router's input",
    "gate.logits": "the router's products",
    "gate.scores": "sigmoid or softmax of the logits",
    "gate.choice": "scores with the selection bias",
    "gate.weights": "routing weights",
    "*swiglu.act": "silu(gate) * up",
    "experts.out": "the weighted sum of the chosen experts",
    "moe.out": "routed and shared experts together",
    "residual": "the residual stream",
    "lm_head.out": "the logits",
    "optim.master": "the weights that the optimiser updates",
    "optim.weight": "the weights that the model reads",
    "optim.moment1": "the first moment of AdamW",
    "optim.moment2": "the second moment of AdamW",
    "optim.bias": "the selection bias",
    "optim.ema": "the average of the parameters",
    "d.*": "the gradient of the value at the site that follows",
}

KEPT: Final = {  # where values are saved for the backward pass and nowhere else
    "norm.in": "the input of an RMSNorm",
    "rope.in": "the key part that is rotated, shared by all heads",
    "attention.key": "the keys",
    "attention.value": "the values",
    "*swiglu.gate": "the output of gate_proj, which SwiGLU reads",
    "*swiglu.up": "the output of up_proj, which SwiGLU reads",
    "experts.slots": "each expert's output, before its routing weight",
}

PRODUCTS: Final = {  # what a GEMM makes of its operands
    "*.in.fprop": "the input as Fprop reads it",
    "*.in.wgrad": "the input as Wgrad reads it, contracted over tokens",
    "*.dy.wgrad": "the incoming gradient as Wgrad reads it",
    "*.weight": "the weight as Fprop and Dgrad read it",
    "*.fprop": "how y = x w^T accumulates",
    "*.dgrad": "how dx = dy w accumulates",
    "*.wgrad": "how dw = dy^T x accumulates",
    "grad": "the gradient of a weight, and its sum over microbatches",
}

FUSED: Final = {  # inside of an operation: stored only by systems that compute it in several kernels
    "fused.rope.frequency": "the rotary frequencies",
    "fused.rope.angle": "position times frequency",
    "fused.rope.product": "x cos and x sin, before their sum",
    "fused.d.rope.product": "dy cos and dy sin, before their sum",
    "fused.d.rope.out": "the gradient of the rotated key part, summed over heads",
    "fused.attention.products": "query-key products, before the scale",
    "fused.attention.softmax": "softmax of the scores, before the cast to what multiplies the values",
    "fused.d.attention.softmax": "the gradient of the scaled scores, before the scale",
    "fused.*swiglu.silu": "silu(gate), before the product with up",
    "fused.d.*swiglu.silu": "its gradient",
    "fused.d.norm.normed": "dy times gain",
    "fused.gate.sum": "the sum of the chosen scores, and these divided by it",
    "fused.experts.slot": "an expert's output times its routing weight",
    "fused.experts.sum": "the sum of these so far, expert by expert in the order of their numbers",
    "fused.d.experts.sum": "the sum of the experts' input gradients so far, likewise",
    "fused.d.moe.in": "the input gradients of routed and shared experts together, without the router's",
    "fused.grad.products": "a gain's gradient token by token, before the sum",
    "fused.grad.rows": "the embedding's gradient after each token",
}

DECODING: Final = {  # where new tokens are computed from caches
    "cache.latent": "the normalised latent in the cache",
    "cache.k_pe": "the rotated shared key part in the cache",
    "absorbed.query": "the query times the key rows of kv_b: in the space of the latent",
    "absorbed.out": "the sum of latents times the value rows of kv_b: heads' outputs",
    "attention.partial": "heads' outputs of a part of the keys",
    "attention.lse": "the logarithm of a part's sum of exponentials",
}

SITES: Final = VALUES | KEPT | PRODUCTS | FUSED | DECODING

UP: Final = (  # what attention computes again from its latents, all of it if any was not kept
    "q_b_proj.in",
    "kv_b_proj.in",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.probs",
)
RECOMPUTABLE: Final = (  # where a layer can compute a value again in backward, if it was not kept
    "self_attn.in",
    *UP,
    "mlp.in",
    "gate.in",
    "experts.in",
    "shared_experts.in",
    "down_proj.in",
    "experts.down_proj.in",
    "shared_experts.down_proj.in",
    "eh_proj.in",
    "lm_head.in",
)

OWNERS: Final = ("shared_experts", "experts")


def within(path: str, name: str) -> str:
    """The site `name` inside of the module at a checkpoint path: "experts.down_proj.in"."""
    parts = path.split(".")
    owner = next((owner for owner in OWNERS if owner in parts), None)
    return name if owner is None else f"{owner}.{name}"


def linear(path: str) -> str:
    """The name that the sites of the linear at a checkpoint path begin with."""
    leaf = path.rpartition(".")[2]
    return within(path, "lm_head" if leaf == "head" else leaf)


LINEARS: Final = {  # a linear -> the site of its input, which several may share
    "q_proj": "self_attn.in",
    "q_a_proj": "self_attn.in",
    "kv_a_proj_with_mqa": "self_attn.in",
    "q_b_proj": "q_b_proj.in",
    "kv_b_proj": "kv_b_proj.in",
    "o_proj": "o_proj.in",
    **{
        f"{owner}{own}": f"{owner or 'mlp.'}in" if own != "down_proj" else f"{owner}down_proj.in"
        for owner in ("", "experts.", "shared_experts.")
        for own in ("gate_proj", "up_proj", "down_proj")
    },
    "eh_proj": "eh_proj.in",
    "lm_head": "lm_head.in",
}


GEMMS: Final = frozenset(f"{own}.{gemm}" for own in LINEARS for gemm in ("fprop", "dgrad", "wgrad"))
_INPUTS: Final = frozenset(LINEARS.values())


def read_by(own: str) -> str:
    """The site of the input of a linear."""
    return LINEARS.get(own, f"{own}.in")


def tiles(site: str) -> tuple[str, ...]:
    """The tiles that an operand's codes may have where a GEMM reads them; () where none does."""
    own, _, part = site.rpartition(".")
    if site in _INPUTS or (part == "fprop" and own in _INPUTS) or part == "dy":
        return "1x128", "128x128", "tensor"
    if part == "wgrad" and (own in _INPUTS or own.endswith(".dy")):
        return "128x1", "128x128", "tensor"
    return ("128x128", "tensor") if part == "weight" and not site.startswith("optim.") else ()


def reads(site: str, field: str) -> bool:
    """Whether a rule's field means anything at a site.

    Products say how they add up, and nothing else: their results are stored as other sites say.  `of` counts
    where something is quantised again, or saved as it was before it was rounded.
    """
    if site in GEMMS or field == "accumulator":
        return site in GEMMS and field == "accumulator"
    again = (".in.fprop", ".in.wgrad", ".dy.wgrad")
    return field != "of" or site.endswith(again) or site in ("norm.normed", "attention.probs")


GRADIENTS: Final = (  # sites of the forward pass that have one for their gradient: `d.NAME`
    *("logits", "hidden", "residual", "norm.in", "norm.normed", "self_attn.in", "mlp.in", "moe.in"),
    *("attention.query", "attention.key", "attention.value", "attention.scores", "attention.softmax"),
    *("attention.probs", "rope.in", "rope.out", "gate.in", "gate.logits"),
    *("experts.in", "experts.slots", "experts.sum"),
)


def every() -> tuple[str, ...]:
    """The sites of a network and of its training, without patterns."""
    names = [
        name
        for pattern in SITES
        for name in ([pattern] if "*" not in pattern else [])
        if name not in ("lm_head.out",)
    ]
    for site in dict.fromkeys(LINEARS.values()):
        names += [site, f"{site}.fprop", f"{site}.wgrad"]
    for own in LINEARS:
        names += [
            f"{own}.{part}" for part in ("weight", "fprop", "out", "dy", "dgrad", "dx", "dy.wgrad", "wgrad")
        ]
    for owner in ("", *(f"{owner}." for owner in OWNERS)):
        names += [f"{owner}swiglu.{part}" for part in ("gate", "up", "act")]
        names += [f"fused.{owner}swiglu.silu", f"fused.d.{owner}swiglu.silu"]
    return (*names, *(f"d.{name}" for name in GRADIENTS))
