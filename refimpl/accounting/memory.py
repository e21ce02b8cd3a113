"""The memory of training under several recipes, side by side.  SPEC RECIPE-14 to RECIPE-16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from refimpl.accounting import kept, parameters
from refimpl.accounting.kept import Unit
from refimpl.accounting.load import Load
from refimpl.accounting.parameters import PARTS, Group
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.numerics import sites
from refimpl.numerics.recipe import Recipe

KINDS: Final = ("dense layer", "MoE layer", "MTP module", "head", "embedding")
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
SAME: Final = "recomputing"  # the name of a recipe that computes again what another does


@dataclass(frozen=True)
class Memory:
    """Of one recipe."""

    recipe: str
    load: Load
    groups: list[Group]
    units: list[Unit]

    @property
    def kept(self) -> int:
        return kept.total(self.units)

    @property
    def peak(self) -> int:
        return kept.peak(self.units)

    def layer(self, kind: str) -> Unit | None:
        """The first unit of a kind."""
        return next((unit for unit in self.units if unit.kind == kind), None)

    def count(self, kind: str) -> int:
        return sum(unit.kind == kind for unit in self.units)


def memory(
    config: ModelConfig, recipes: Sequence[Recipe], load: Load, choices: Choices | None = None
) -> list[Memory]:
    """For each recipe.  Raises Unsupported for a model with an indexer."""
    return [
        Memory(
            recipe.name,
            load,
            parameters.groups(config, recipe),
            kept.predicted(config, recipe, load, choices),
        )
        for recipe in recipes
    ]


def recomputing(recipe: Recipe, like: Recipe) -> Recipe:
    """The recipe with everything computed again that `like` computes again: what formats alone save shows
    against this one."""
    changed = recipe
    for site in sites.RECOMPUTABLE:
        if like.rule(site).keep == "recomputed":
            changed = changed.changed(site, keep="recomputed")
    return Recipe(f"{recipe.name}, {SAME}", changed.rules, recipe.carrier)


def parameter_rows(found: Sequence[Memory]) -> Table:
    """Bytes per parameter, group by group: head and rows."""
    found = _apart(found)
    head = ["parameters of", "number"]
    for m in found:
        head += [f"{m.recipe}: weight", f"{m.recipe}: in all"]
    whole = tuple(parameters.total(m.groups) for m in found)
    body: list[tuple[str, ...]] = []
    for same in [*zip(*(m.groups for m in found), strict=True), whole]:
        pairs = ((group.weight + group.scales, group.total) for group in same)
        cells = (_per(part, same[0].count, 4) for pair in pairs for part in pair)
        body.append((same[0].name, f"{same[0].count:,}", *cells))
    return tuple(head), body


def part_rows(found: Sequence[Memory]) -> Table:
    """Bytes per parameter over all of them, part by part: head and rows."""
    found = _apart(found)
    whole = [parameters.total(m.groups) for m in found]
    body = [(part, *(_per(getattr(group, part), group.count, 4) for group in whole)) for part in PARTS]
    body.append(("in all", *(_per(group.total, group.count, 4) for group in whole)))
    body.append(("all parameters, GB", *(_giga(group.total) for group in whole)))
    return ("bytes per parameter", *(m.recipe for m in found)), body


def _apart(found: Sequence[Memory]) -> list[Memory]:
    """Without those that differ in activations alone."""
    return [m for m in found if not m.recipe.endswith(SAME)]


def activation_rows(found: Sequence[Memory], kind: str) -> Table:
    """Bytes per token of the first unit of a kind, site by site: head and rows; none without such a unit."""
    units = [m.layer(kind) for m in found]
    if any(unit is None for unit in units):
        return (), []
    names = list(dict.fromkeys(site for unit in units if unit for site in unit.kept))
    tokens = found[0].load.tokens
    body = [(site, *(_per(unit.kept.get(site, 0), tokens) for unit in units if unit)) for site in names]
    body.append(("all", *(_per(unit.total, tokens) for unit in units if unit)))
    return (f"{kind}, {found[0].count(kind)} of them", *(m.recipe for m in found)), body


def whole_rows(found: Sequence[Memory]) -> Table:
    """The model: bytes kept at the end of the forward pass, and the most during the backward pass."""
    tokens = found[0].load.tokens
    head = ("whole model", *(m.recipe for m in found))
    return head, [
        ("kept for backward, bytes per token", *(_per(m.kept, tokens) for m in found)),
        ("kept for backward, GB", *(_giga(m.kept) for m in found)),
        ("most held during backward, GB", *(_giga(m.peak) for m in found)),
    ]


def as_json(found: Sequence[Memory]) -> dict[str, Any]:
    """All of it, in bytes."""
    load = found[0].load
    return {
        "tokens": [load.size, load.length],
        "recipes": {
            m.recipe: {
                "parameters": [asdict(group) | {"total": group.total} for group in m.groups],
                "activations": [
                    {"kind": unit.kind, "layer": unit.layer, "kept": dict(unit.kept), "total": unit.total}
                    for unit in m.units
                ],
                "kept": m.kept,
                "peak": m.peak,
            }
            for m in found
        },
    }


def _per(count: int, of: int, digits: int = 1) -> str:
    """A quotient with up to so many digits after the point."""
    shown = f"{count / of:,.{digits}f}" if of else "0.0"
    return shown.rstrip("0").rstrip(".")


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3f}"
