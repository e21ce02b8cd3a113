"""Rounding happens at sites, and a recipe says how.  SPEC RECIPE-1 to RECIPE-3.

A site is a named boundary where a real system stores a tensor, sends it, or feeds it to a GEMM.  A recipe is
a table from site to rule.  `Rounded` is the exact arithmetic with the recipe's roundings: contractions and
functions stay correctly rounded in float64, and a value is rounded, once and to nearest even, where it
crosses a site.  So a recipe says all there is to say about precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from refimpl.numerics import formats
from refimpl.numerics.arithmetic import Array, Exact, Kept, Operand, Plain

SITES = {
    "embed.out": "rows of the embedding",
    "norm.normed": "x / rms, before the gain",
    "norm.out": "output of an RMSNorm",
    "*.in": "the input of a linear, read by Fprop and Wgrad",
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
    "swiglu.act": "silu(gate) * up",
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


@dataclass(frozen=True)
class Rule:
    """What happens at the sites that match a pattern; the first match counts."""

    site: str  # a site or a pattern over sites
    format: str  # a name of formats.FORMATS, or "carrier" for no rounding
    evidence: str  # "recorded" (seen in code or on hardware) or "modelled"
    source: str


@dataclass(frozen=True)
class Recipe:
    """A named table of rules."""

    name: str
    rules: tuple[Rule, ...]

    def format(self, site: str) -> str:
        """The format that values have at a site."""
        for rule in self.rules:
            if fnmatchcase(site, rule.site):
                return rule.format
        raise AssertionError(f"recipe {self.name} has no rule for site {site}")


_HF = "transformers modeling_deepseek_v3.py"
RECIPES = {
    "bf16": Recipe(
        "bf16",
        (
            Rule("gate.*", "fp32", "recorded", f"{_HF}: the router runs in float32"),
            Rule("d.gate.*", "fp32", "recorded", f"{_HF}: the router runs in float32"),
            Rule(
                "attention.scores", "fp32", "modelled", "report section 3.3.1: attention keeps high precision"
            ),
            Rule("d.attention.scores", "fp32", "modelled", "report section 3.3.1"),
            Rule("rope.table", "bf16", "recorded", f"{_HF}: cos and sin are cast to the input's dtype"),
            Rule("norm.normed", "bf16", "recorded", f"{_HF}: cast before the gain"),
            Rule("lm_head.out", "fp32", "modelled", "the loss is taken in float32"),
            Rule("d.logits", "bf16", "modelled", "the gradient that enters the head's Dgrad and Wgrad"),
            Rule("optim.moment*", "bf16", "recorded", "report section 3.3.3: moments in BF16"),
            Rule("optim.weight", "bf16", "recorded", "every weight is read in bfloat16"),
            Rule("optim.*", "fp32", "recorded", "report section 3.3.3: master weights in FP32"),
            Rule("*", "bf16", "recorded", "every activation is stored in bfloat16"),
        ),
    ),
}


class Rounded(Exact):
    """The exact arithmetic with a recipe's roundings at its sites."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self._format = cache(recipe.format)

    def at(self, site: str, x: Array) -> Array:
        name = self._format(site)
        return x if name == "carrier" else formats.round_to(x, formats.FORMATS[name])

    def keep(self, site: str, x: Array) -> Kept:
        return Plain(x)

    def operand(self, site: str, x: Array) -> Operand:
        return Operand(self.at(site, x))
