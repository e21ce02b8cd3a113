"""Bytes of parameters while they are trained.  SPEC RECIPE-16.

A weight is there as it is read (codes with scales, or numbers), as the master that the optimiser updates,
with its gradient and its two moments.  Where a GEMM reads codes these stand in for the weight in numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from refimpl.accounting.sizes import Sizes, scales
from refimpl.checkpoint import names
from refimpl.config.model import ModelConfig
from refimpl.numerics import sites
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.rounded import bits

PARTS = ("weight", "scales", "master", "gradient", "moments")


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, and the bytes of each part."""

    name: str
    count: int
    weight: int
    scales: int
    master: int
    gradient: int
    moments: int

    @property
    def total(self) -> int:
        return self.weight + self.scales + self.master + self.gradient + self.moments

    def times(self, number: int) -> Group:
        return Group(self.name, *(number * getattr(self, part) for part in ("count", *PARTS)))

    def plus(self, other: Group) -> Group:
        both = (getattr(self, part) + getattr(other, part) for part in ("count", *PARTS))
        return Group(self.name, *both)


GROUPS = {  # role of a parameter -> its group
    "embedding": "embedding",
    "gain": "gains of norms",
    "router": "routers",
    "bias": "selection biases",
    "shift": "shifts",
}


def groups(config: ModelConfig, recipe: Recipe, modules: bool = True) -> list[Group]:
    """Linears by the module that has them, embedding, head, gains, routers, biases; MTP modules included."""
    alike: Counter[tuple[str, str, str, tuple[int, ...]]] = Counter()  # thousands of experts' are
    for name, spec in names.parameters(config).items():
        if spec.kind != "scale" and (modules or not spec.mtp):
            alike[sites.linear(name.removesuffix(".weight")), spec.kind, spec.role, spec.shape] += 1
    found: dict[str, Group] = {}
    for (own, kind, role, shape), number in alike.items():
        made = _made(GROUPS.get(role) or _of_linear(own), recipe, own, kind, role, shape)
        made = made.times(number)
        found[made.name] = found[made.name].plus(made) if made.name in found else made
    return list(found.values())


def total(all_groups: Iterable[Group]) -> Group:
    """Everything as one group."""
    whole = Group("all", 0, 0, 0, 0, 0, 0)
    for group in all_groups:
        whole = whole.plus(group)
    return whole


def _of_linear(own: str) -> str:
    owner = own.rpartition(".")[0]
    if owner:
        return "shared experts" if owner == "shared_experts" else "routed experts"
    if own in ("gate_proj", "up_proj", "down_proj"):
        return "dense MLPs"
    return {"lm_head": "head", "eh_proj": "eh_proj"}.get(own, "attention")


def _made(group: str, recipe: Recipe, own: str, kind: str, role: str, shape: tuple[int, ...]) -> Group:
    size = math.prod(shape)
    if kind == "buffer":  # the selection bias: read and moved in its own format, without a gradient
        return Group(group, size, size * bits(recipe.format("optim.bias")) // 8, 0, 0, 0, 0)
    rule = Sizes(recipe).rule(f"{own}.weight") if role == "linear" else None
    codes = rule is not None and rule.scaled
    held = rule.format if rule is not None and codes else recipe.format("optim.weight")
    grids = 0 if rule is None or not codes else scales(rule, shape[0], shape[1])

    def part(site: str) -> int:
        return size * bits(recipe.format(site)) // 8

    moments = part("optim.moment1") + part("optim.moment2")
    return Group(group, size, size * bits(held) // 8, grids, part("optim.master"), part("grad"), moments)
