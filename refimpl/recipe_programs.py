"""A component run in a recipe, GEMM by GEMM.  SPEC CASE-7, CASE-17.

    PATH.SITE            the values that are quantised, as float32
    PATH.SITE.codes      what is kept of them, or what Dgrad reads; their scales are .codes_scale
    PATH.GEMM.a, .b      codes that a GEMM reads, of a linear at PATH: fprop x and w, dgrad dy and w^T,
                         wgrad dy^T and x^T, K padded with zeros to whole tiles
    PATH.GEMM.a_scale, .b_scale      their scales, (rows, K / 128)
    PATH.GEMM.d          what the accumulator gives, float32
    the others           as the component's program names them

`Noting` writes down all of them in the order of computation.  Given a port's tensors it goes on with those
wherever there are any, so each is judged as made from the port's own operands, and a fault is found where it
is and nowhere after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from refimpl import programs
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array, Kept, Operand
from refimpl.numerics.blockscale import Quantised
from refimpl.numerics.float32 import canonical
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.recipe import ACCUMULATORS, Recipe, Rule
from refimpl.numerics.rounded import Rounded
from refimpl.numerics.scaled import Coded, Origin, Rows, Scaled, as_rows, quantised
from refimpl.numerics.sites import OWNERS
from refimpl.setting import Setting

VALUE, CODES, SCALES, PRODUCT = "value", "codes", "scales", "product"

# Rules that make scales in the same way but for the order of two roundings: any of a family is right.
FAMILIES: Final = (
    ("ieee", "deepgemm_sat", "torch_dg", "triton_v3", "v32", "w_block"),
    ("ue8m0", "torch_dg_ue8m0", "triton_v3_ue8m0", "v32_ue8m0", "w_block_ue8m0"),
)


_TYPES: Final = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}  # of codes in a file; others are plain integers


def _family(rule: Rule) -> tuple[str, ...]:
    """The other names of rules that are as right."""
    family = next((f for f in FAMILIES if rule.scale in f), ())
    return tuple(scale for scale in family if scale != rule.scale)


def _of_the_other(own: Scaled | None, rule: Rule) -> dict[str, Rows]:
    """What Wgrad reads, made of the source where the rule says of codes, and the other way round: a question
    that the report leaves open."""
    if own is None or own.stored.origin is None:
        return {}
    other = "source" if rule.of == "codes" else "codes"
    x = own.stored.origin.x if other == "source" else own.value
    rules = [rule, *(replace(rule, scale=scale) for scale in _family(rule))]
    name = f"{own.plan.site}.wgrad.of={other}"
    return {f"{name} and {r.scale}": as_rows(x, r, True) for r in rules}


@dataclass(frozen=True)
class Met:
    """A tensor on the way.  theirs: the port's, if it gave one; others: the same made by other rules that
    are as right, by name."""

    name: str
    kind: str
    ours: Array
    theirs: Array | None
    others: Callable[[], dict[str, Array]] = dict
    dtype: str = ""  # of codes: their type in a file


@dataclass
class _State:
    path: str = ""
    quantising: str = ""  # the operand that is being made
    met: dict[str, Met] = field(default_factory=dict)
    theirs: Mapping[str, Array] = field(default_factory=dict)
    along: dict[int, Scaled] = field(default_factory=dict)  # whose the rows are that Wgrad reads, by identity


class Noting(Rounded):
    """A recipe's arithmetic that writes down what its GEMMs read and make."""

    def __init__(self, recipe: Recipe, theirs: Mapping[str, Array] | None = None) -> None:
        super().__init__(recipe)
        self._state = _State(theirs=theirs or {})

    @property
    def met(self) -> list[Met]:
        """In the order of computation."""
        return list(self._state.met.values())

    def operand(self, site: str, x: Array) -> Operand:
        if not self._rule(site).scaled:
            return super().operand(site, x)
        name, single = self._named(site), np.asarray(x, np.float32)  # what quantisation reads
        values = self.array(self._meet(name, VALUE, single))
        self._state.quantising = f"{name}.codes"
        return super().operand(site, values)

    def quantise(self, x: Array, rule: Rule, transposed: bool) -> Rows:
        made = replace(self.made(x, rule, transposed), origin=Origin(x, rule, transposed))
        name, self._state.quantising = self._state.quantising, ""
        return self._read(name, made) if name else made

    def made(self, x: Array, rule: Rule, transposed: bool) -> Rows:
        """The codes; what a mistake in quantisation changes."""
        return super().quantise(x, rule, transposed)

    def keep(self, site: str, x: Array) -> Kept:
        kept = super().keep(site, x)
        if not isinstance(kept, Coded):
            return kept
        flat, rule = x.reshape(-1, x.shape[-1]), self._rule(site)

        def read(made: Quantised) -> Rows:
            return Rows(made.codes, made.scales, made.format.name)

        others = {scale: replace(rule, scale=scale) for scale in _family(rule)}
        own = self._judged(
            f"{self._named(site)}.codes",
            read(kept.quantised),
            lambda: {scale: read(quantised(flat, other)) for scale, other in others.items()},
        )
        return replace(kept, quantised=replace(kept.quantised, codes=own.codes, scales=own.scales))

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        read = [own for own in (dy, x) if isinstance(own, Scaled) and own.plan.along.scaled]
        self._state.along = {id(own.along): own for own in read}
        return super().wgrad(dy, x)

    def gemm(self, site: str, a: Rows, b: Rows) -> Array:
        name = f"{self._state.path}.{site.rpartition('.')[2]}"
        a, b = self._read(f"{name}.a", a), self._read(f"{name}.b", b)
        kernel = self._rule(site).accumulator or "exact"

        def product(by: str) -> Array:
            made = gemm_fp8(a.codes, a.scales, b.codes, b.scales, by, a_format=a.format, b_format=b.format)
            return canonical(np.asarray(made, np.float32))

        others = {by: by for by in ACCUMULATORS if by not in (kernel, "unpromoted")}
        own = product(kernel)
        return self.array(self._meet(f"{name}.d", PRODUCT, own, lambda: {by: product(by) for by in others}))

    def _read(self, name: str, rows: Rows) -> Rows:
        origin, own = rows.origin, self._state.along.get(id(rows))

        def others() -> dict[str, Rows]:
            if origin is None:
                return {}
            rules = {scale: replace(origin.rule, scale=scale) for scale in _family(origin.rule)}
            found = {scale: as_rows(origin.x, rule, origin.transposed) for scale, rule in rules.items()}
            return found | _of_the_other(own, origin.rule)

        return self._judged(name, rows, others)

    def _judged(self, name: str, rows: Rows, others: Callable[[], dict[str, Rows]]) -> Rows:
        dtype = _TYPES.get(rows.format, "U16")
        codes = self._meet(name, CODES, rows.codes, lambda: {k: r.codes for k, r in others().items()}, dtype)
        scales = self._meet(
            f"{name}_scale", SCALES, rows.scales, lambda: {k: r.scales for k, r in others().items()}
        )
        return Rows(codes, scales, rows.format, rows.origin)

    def _meet(
        self,
        name: str,
        kind: str,
        ours: Array,
        others: Callable[[], dict[str, Array]] = dict,
        dtype: str = "",
    ) -> Array:
        state = self._state
        before = state.met.get(name)
        if before is not None and not np.array_equal(before.ours, ours):
            name = f"{name}.again"  # computed again, from what was kept
        theirs = state.theirs.get(name)
        if theirs is not None:
            theirs = theirs.reshape(ours.shape)
        state.met.setdefault(name, Met(name, kind, ours, theirs, others, dtype))
        return ours if theirs is None else theirs

    def _named(self, site: str) -> str:
        """The site below the path of the module that is running."""
        path = self._state.path
        owner, _, rest = site.partition(".")
        if owner in OWNERS and owner in path.split("."):
            site = rest
        leaf = path.rpartition(".")[2]
        site = site.removeprefix(f"{leaf}.")
        return f"{path}.{site}" if path else site


def located(ar: Noting, ops: Ops) -> Ops:
    """The operations, each of which says to the arithmetic where it is."""

    def within(call: Callable[..., Any]) -> Callable[..., Any]:
        def located_call(c: Context, *given: Any, **named: Any) -> Any:
            before, ar._state.path = ar._state.path, c.path
            try:
                return call(c, *given, **named)
            finally:
                ar._state.path = before

        return located_call

    names = ("linear", "mla", "mlp", "gate", "experts", "moe", "block", "mtp")
    own: dict[str, Any] = {}
    for name in names:
        op: Op = getattr(ops, name)
        own[name] = Op(within(op.forward), within(op.backward), within(op.again))
    return replace(ops, **own)


def run(
    component: str,
    setting: Setting,
    recipe: Recipe,
    theirs: Mapping[str, Array] | None = None,
    arithmetic: Callable[[Recipe], Noting] | None = None,
) -> list[Met]:
    """Everything that the component computes in the recipe, in order; the results come last.

    theirs: a port's tensors, to go on with; arithmetic: another one that notes, such as a mutant's."""
    ar = Noting(recipe, theirs) if arithmetic is None else arithmetic(recipe)
    outputs = programs.run(component, replace(setting, ar=ar, ops=located(ar, setting.ops)))
    given = theirs or {}
    results = [
        Met(name, VALUE, np.asarray(y), given[name].reshape(np.shape(y)) if name in given else None)
        for name, y in outputs.items()
    ]
    return [*ar.met, *results]
