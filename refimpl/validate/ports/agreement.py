"""Which cases an implementation can be held to: those whose choices it shares.  SPEC CHOICE-1.

A case is made with one alternative for every choice, but few of them matter to it.  What counts is the
effect: YaRN that applies in both, the same epsilon, the same number of scores in a group's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import loss, rope
from refimpl.validate.given import NotForMe, PortCase

KINDS: Final = ("forward", "vjp")
ROTARY: Final = frozenset({"rope", "rope_tables", "attention", "mla", "block", "model"})
LATENT: Final = frozenset({"mla", "block", "model"})
GATED: Final = frozenset({"gate", "moe", "block", "model"})


def model_cases(case: PortCase) -> None:
    """Raises NotForMe for the kinds of cases that no model library answers."""
    if case.kind == "reject":
        raise NotForMe("the library does not check what it is given")
    if case.kind not in KINDS:
        raise NotForMe(f"the library has nothing that answers a case of kind {case.kind}")


def routes(case: PortCase, config: ModelConfig) -> bool:
    """Whether the case runs a gate."""
    if case.component == "block":
        return config.is_moe_layer(case.arguments["layer"])
    return case.component in GATED


def demand(case: PortCase, config: ModelConfig, own: Choices, name: str) -> None:
    """Raises NotForMe when the case was made with an alternative that gives other values than `own`."""
    for choice in _differing(case, config, Choices.from_dict(case.choices), own):
        wanted, has = case.choices[choice], getattr(own, choice)
        raise NotForMe(f"the case has {choice} = {wanted}, and {name} computes with {has}")


def _differing(case: PortCase, config: ModelConfig, theirs: Choices, own: Choices) -> Iterator[str]:
    component = case.component
    if component in ROTARY:
        if theirs.yarn_active(config) != own.yarn_active(config):
            yield "yarn_applies"
        elif rope.cos_sin_factor(config, theirs) != rope.cos_sin_factor(config, own):
            yield "yarn_mscale_zero"
    if component in LATENT and theirs.norm_epsilon(config) != own.norm_epsilon(config):
        yield "latent_norm_epsilon"
    if routes(case, config):
        yield from _differing_in_the_gate(config, theirs, own)
    targets = case.inputs.get("targets", case.inputs.get("labels"))
    some_ignored = targets is not None and bool(np.equal(targets, loss.IGNORED).any())
    if some_ignored and theirs.loss_divisor != own.loss_divisor:
        yield "loss_divisor"


def _differing_in_the_gate(config: ModelConfig, theirs: Choices, own: Choices) -> Iterator[str]:
    single, normalised = config.num_experts_per_tok == 1, config.norm_topk_prob
    if config.has_selection_bias:
        limited = config.kept_groups < config.groups
        if limited and theirs.group_score_count(config) != own.group_score_count(config):
            yield "group_score_size"
        if single and normalised and theirs.topk_norm_single != own.topk_norm_single:
            yield "topk_norm_single"
    elif normalised and not single and theirs.v2_topk_norm != own.v2_topk_norm:
        yield "v2_topk_norm"
