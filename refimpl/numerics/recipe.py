"""A recipe: how values are rounded, multiplied and kept, site by site.  SPEC RECIPE-1 to RECIPE-4.

A recipe is a list of rules from a pattern over sites to what happens there; the first rule that matches
counts.  An ablation is a recipe with one rule changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from refimpl.errors import Invalid
from refimpl.numerics import gemm, sites
from refimpl.numerics.blockscale import QUANTISERS
from refimpl.numerics.formats import FORMATS

CARRIER: Final = "carrier"
TILES: Final = ("", "1x128", "128x1", "128x128", "tensor")
KEPT: Final = ("plain", "codes", "recomputed")
CARRIERS: Final = ("exact", "float32")
FP8: Final = ("e4m3", "e5m2")  # what tensor cores multiply
ACCUMULATORS: Final = tuple(name for name in gemm.NAMES if not name.startswith("cublas"))


@dataclass(frozen=True)
class Rule:
    """What happens at the sites that match a pattern."""

    site: str  # a site or a pattern over sites
    format: str  # a format of numbers in formats.FORMATS, or "carrier" for no rounding
    evidence: str  # "recorded" (seen in code, on hardware or in the report) or "modelled"
    source: str
    tile: str = ""  # values that share a scale, rows x columns; "" for a format without scales
    scale: str = ""  # how scales are made: a row of blockscale.QUANTISERS
    of: str = "codes"  # what another GEMM quantises anew, or a gradient reads: what was kept, or its "source"
    keep: str = "plain"  # how backward finds the value: "plain", as "codes", or "recomputed"
    accumulator: str = ""  # of a product: a row of gemm.KERNELS, or "exact"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                shown = ", ".join(v or repr(v) for v in allowed)
                raise Invalid(f"{self.site}.{name} is {value!r}, but it must be one of {shown}.")
        if self.scaled and not self.scale:
            raise Invalid(f"{self.site}.scale is empty, but {self.format} in tiles needs one.")

    @property
    def scaled(self) -> bool:
        """Whether values are codes with scales."""
        return bool(self.tile) and self.format in SCALED


def _check_place(site: str, rule: Rule) -> None:
    """Raises Invalid for what a rule cannot mean at a site."""
    if rule.keep == "recomputed" and site not in sites.RECOMPUTABLE:
        raise Invalid(
            f"{site}.keep is 'recomputed', but it must be plain or codes: no layer computes that value again."
        )
    tiles = sites.tiles(site)
    if rule.scaled and tiles and rule.format not in FP8 and not site.endswith((".in", ".dy")):
        raise Invalid(
            f"{site}.format is {rule.format!r}, but a product reads codes of {' or '.join(FP8)} alone."
        )
    if rule.scaled and tiles and rule.tile not in tiles:
        raise Invalid(
            f"{site}.tile is {rule.tile!r}, but it must be one of {', '.join(tiles)}: a product's scales "
            "differ along its contracted axis by whole tiles of 128 only."
        )


_NUMBERS: Final = tuple(name for name, fmt in FORMATS.items() if fmt.kind != "scale")
SCALED: Final = tuple(name for name in _NUMBERS if FORMATS[name].bits <= 12)
_ALLOWED: Final[dict[str, tuple[str, ...]]] = {
    "format": (CARRIER, *_NUMBERS),
    "evidence": ("recorded", "modelled"),
    "tile": TILES,
    "scale": ("", *QUANTISERS),
    "of": ("codes", "source"),
    "keep": KEPT,
    "accumulator": ("", *ACCUMULATORS),
}
FIELDS: Final = tuple(f.name for f in fields(Rule))
CHANGEABLE: Final = tuple(f.name for f in fields(Rule) if f.name not in ("site", "evidence", "source"))


@dataclass(frozen=True)
class Recipe:
    """A named table of rules, and the numbers between its sites: exact, or float32 on BLAS, which is fast and
    has the platform's bits."""

    name: str
    rules: tuple[Rule, ...]
    carrier: str = "exact"

    def __post_init__(self) -> None:
        if self.carrier not in CARRIERS:
            raise Invalid(f"carrier is {self.carrier!r}, but it must be one of {', '.join(CARRIERS)}.")
        for site in sites.every():
            rule = next((rule for rule in self.rules if fnmatchcase(site, rule.site)), None)
            if rule is not None:
                _check_place(site, rule)

    def rule(self, site: str) -> Rule:
        """The rule of a site."""
        for rule in self.rules:
            if fnmatchcase(site, rule.site):
                return rule
        raise AssertionError(f"recipe {self.name} has no rule for site {site}")

    def format(self, site: str) -> str:
        """The format that values have at a site."""
        return self.rule(site).format

    @property
    def scaled(self) -> bool:
        """Whether any GEMM reads codes with scales."""
        return any(rule.scaled for rule in self.rules)

    @property
    def adds_in_turn(self) -> bool:
        """Whether the gradients of microbatches are added in their order, in less than float32."""
        return any(rule.site == "grad" and rule.format not in (CARRIER, "fp32") for rule in self.rules)

    @property
    def meaning(self) -> dict[str, str]:
        """What decides its numbers: the carrier, the rows' sites in their order, and their fields, without
        names and sources."""
        rows = list(enumerate(self.rules, 1))
        fields = {f"row {i}, {r.site}.{name}": getattr(r, name) for i, r in rows for name in CHANGEABLE}
        return {"carrier": self.carrier} | {f"row {i}": rule.site for i, rule in rows} | fields

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types; `from_dict` reads it back."""
        return {"name": self.name, "carrier": self.carrier, "rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Recipe:
        """Raises Invalid for what `to_dict` does not write, and for a site without a rule."""
        rules = given.get("rules")
        if set(given) != {"name", "carrier", "rules"} or not isinstance(rules, list):
            raise Invalid("a recipe has other fields than name, carrier and rules, but it must have these.")
        for rule in (*rules, {name: given[name] for name in ("name", "carrier")}):
            if not isinstance(rule, Mapping) or not all(isinstance(value, str) for value in rule.values()):
                raise Invalid(f"a rule of a recipe is {rule!r:.80}, but its fields must be text.")
        for rule in rules:
            if set(rule) != set(FIELDS):
                raise Invalid(
                    f"a rule has fields {sorted(rule)!r:.80}, but it must have {', '.join(FIELDS)}."
                )
        recipe = cls(given["name"], tuple(Rule(**rule) for rule in rules), given["carrier"])
        for site in sites.every():
            if not any(fnmatchcase(site, rule.site) for rule in recipe.rules):
                raise Invalid(f"recipe {recipe.name} has no rule for site {site}, but every site needs one.")
        return recipe

    def changed(self, site: str, /, **values: Any) -> Recipe:
        """The recipe with another value of some fields, at a site or pattern.

        A rule of that very pattern is changed in its place; else every site that the pattern fits gets a
        rule of its own.  Raises Invalid for an unknown site or field, and for one that nothing reads there.
        """
        for name in values:
            if name not in CHANGEABLE:
                raise Invalid(f"{site}.{name}: a rule has no field {name}, but {', '.join(CHANGEABLE)}.")
        made = {"evidence": "modelled", "source": "changed by hand", **values}
        fitting = [name for name in sites.every() if fnmatchcase(name, site)]
        if not fitting:
            raise Invalid(f"site {site} is unknown, but it must be a site or a pattern that fits one.")
        in_place = any(rule.site == site for rule in self.rules)
        decided = [name for name in fitting if self.rule(name).site == site] if in_place else fitting
        for name in values:
            if not any(sites.reads(own, name) for own in decided):
                raise Invalid(f"{site}.{name} is changed, but nothing reads {name} there.")
        if in_place:
            rules = [replace(rule, **made) if rule.site == site else rule for rule in self.rules]
            return replace(self, rules=tuple(rules))
        own = [replace(self.rule(name), site=name, **made) for name in fitting]
        return replace(self, rules=(*own, *self.rules))

    def set(self, settings: Iterable[str]) -> Recipe:
        """The recipe with SITE.FIELD=VALUE changed, one after another; carrier=VALUE is one too.

        Settings of one site that follow each other are one change: codes need format, tile, scale.
        Raises Invalid.
        """
        recipe = self
        for site, own in groupby(map(_setting, settings), itemgetter(0)):
            values = {name: value for _, name, value in own}
            recipe = recipe.changed(site, **values) if site else replace(recipe, carrier=values[CARRIER])
        return recipe


def _setting(text: str) -> tuple[str, str, str]:
    """(site, field, value); no site for the carrier.  Raises Invalid."""
    where, equals, value = text.partition("=")
    site, dot, name = where.rpartition(".")
    if not equals or (where != CARRIER and not (dot and site)):
        raise Invalid(f"the setting is {text!r}, but it must be SITE.FIELD=VALUE or carrier=VALUE.")
    return site, name, value
