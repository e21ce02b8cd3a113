"""Cases of a recipe: a component computed GEMM by GEMM, with everything that its GEMMs read and make.

SPEC CASE-17.  Codes, scales and products are bits; what is between them are numbers, which hold within eight
times the largest error of the recipe's zoo, relative to |y| + rms(y) for an element, to rms(y) for all
together, and as a common factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np

from refimpl import programs, recipe_programs
from refimpl.cases import exact, format
from refimpl.cases.claims import BITS, CLAIMS
from refimpl.cases.definition import Definition, Flag
from refimpl.cases.folder import FORMAT_OF, KEPT_BITS, as_codes, sample_positions
from refimpl.cases.format import PROBE, REQUIRED, Case, Tensor
from refimpl.cases.judge import Distance, Tolerance, measure
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.contraction import sum_
from refimpl.numerics.float32 import to_bf16
from refimpl.numerics.formats import decode
from refimpl.numerics.precision import recipe as ready
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.rounded import Rounded
from refimpl.recipe_programs import CODES, VALUE, Met
from refimpl.setting import Setting
from refimpl.variants.zoo.recipes import RECIPE_ZOO

TIMES: Final = 8.0
ONCE: Final = (2.0**-8, 2.0**-8 / math.sqrt(3.0), 2.0**-12)  # of values that are stored once in BF16
ONCE_F32: Final = (2.0**-24, 2.0**-24 / math.sqrt(3.0), 2.0**-28)  # and of gradients and weights, in F32
SAMPLES: Final = 16  # of a large tensor; whoever judges computes all of it again
_OMITTED: Final = (".slots", ".scores", ".probs", ".q_pe", ".k_pe")
_TEXT: Final = (
    "Codes, scales and products: the bits, made of the port's own operands where it gives them, by the rule "
    "of the recipe or by another that is as right. Values: eight times the error of the recipe's zoo, with "
    "scales made by the one or the other rule."
)


@dataclass(frozen=True)
class Staged:
    """One case: a component's definition, and the recipe in which it is computed."""

    definition: Definition
    recipe: str
    settings: tuple[str, ...] = ()

    kind: ClassVar[str] = "bits"
    rejects: ClassVar[str | None] = None

    @property
    def id(self) -> str:
        return self.definition.id

    @property
    def suite(self) -> str:
        return self.definition.suite

    @property
    def title(self) -> str:
        return self.definition.title

    @property
    def clauses(self) -> tuple[str, ...]:
        return self.definition.clauses

    @property
    def component(self) -> str:
        return self.definition.component

    @property
    def backward(self) -> bool:
        return self.definition.backward

    @property
    def twin(self) -> str | None:
        return None

    @property
    def flags(self) -> tuple[Flag, ...]:
        return self.definition.flags


def recipe_of(arguments: Mapping[str, Any]) -> Recipe:
    """The recipe of a case, from its arguments."""
    named = arguments["recipe"]
    return ready(named["name"]).set(named.get("set", ()))


def is_staged(case: Case) -> bool:
    """Whether a case runs a component in a recipe; those of quantisation name a row of a table so."""
    return isinstance(case.arguments.get("recipe"), Mapping)


def recipes_of(case: Case) -> list[Recipe]:
    """The case's recipe, and those that make scales in another way that is as right."""
    own = recipe_of(case.arguments)
    others = [member.arithmetic(own) for member in RECIPE_ZOO if member.scales]
    return [own, *(ar.recipe for ar in others if isinstance(ar, Rounded))]


def computed(
    case: Case,
    setting: Setting,
    theirs: Mapping[str, Array] | None = None,
    recipe: Recipe | None = None,
) -> list[Met]:
    """What the case computes, in order; going on with a port's tensors where it gave them."""
    met = recipe_programs.run(case.component, setting, recipe or recipe_of(case.arguments), theirs)
    given = {t.name for t in case.tensors if t.given}  # such as a routing
    return [m for m in met if not m.name.endswith(_OMITTED) and m.name not in given]


def completed(case: Case, setting: Setting, required: Callable[[str], bool]) -> tuple[Case, dict[str, Array]]:
    """(the case with its outputs, name -> codes).  case: with inputs and weights alone."""
    met = computed(case, setting)
    expected: dict[str, Array] = {}
    outputs: list[Tensor] = []
    for m in met:
        codes, dtype = coded(m)
        expected[m.name] = codes
        role = REQUIRED if m.kind == VALUE and required(m.name) else PROBE
        outputs.append(_tensor(m.name, role, codes, dtype))
    within = _within(case, setting, met)
    outputs = [replace(t, within=within.get(t.name)) for t in outputs]
    whole = replace(
        case,
        kind="bits",
        claims=(BITS,),
        tensors=(*case.tensors, *outputs),
        tolerance={"derivation": "stages", "text": _TEXT},
    )
    return _certified(whole, expected), expected


def coded(m: Met) -> tuple[Array, str]:
    """A tensor as codes, and its type in the file: values are BF16 where all of them are such numbers."""
    if m.kind == CODES:
        return m.ours, m.dtype
    if m.ours.dtype.kind in "iu":
        return m.ours.astype(np.int64), "I64"
    single = np.ascontiguousarray(m.ours, np.float32)
    short = to_bf16(single)
    if m.kind == VALUE and np.array_equal(short.astype(np.uint32) << np.uint32(16), single.view(np.uint32)):
        return short, "BF16"
    return as_codes(single), "F32"


def stored_as(y: Array, dtype: str) -> Array:
    """Numbers as the codes of a type, rounded to nearest."""
    if dtype == "I64":
        return np.asarray(y, np.int64)
    single = np.ascontiguousarray(y, np.float32)
    return to_bf16(single) if dtype == "BF16" else as_codes(single)


def value_of(codes: Array, dtype: str) -> Array:
    """Codes of a value's type as numbers."""
    return codes.astype(np.int64) if dtype == "I64" else decode(codes, FORMAT_OF[dtype])


def distance(t: Tensor, ours: Array, theirs: Array) -> Distance:
    """Of a value, flat, from ours under the three numbers of the tensor."""
    assert t.within is not None
    return _measured(ours, theirs, t.within)


def _measured(ours: Array, theirs: Array, three: tuple[float, float, float]) -> Distance:
    rms = _rms(ours)
    element, spread, bias = three
    allowed = Tolerance(element * (np.abs(ours) + rms) + 2.0**-126, spread * rms, bias)
    return measure(ours, theirs, allowed, CLAIMS["bf16"])


def _rms(x: Array) -> float:
    largest = float(np.abs(x).max(initial=0.0)) or 1.0
    y = x / largest
    return math.sqrt(float(sum_(y * y)) / y.size) * largest


def _tensor(name: str, role: str, codes: Array, dtype: str) -> Tensor:
    large = codes.size > KEPT_BITS
    return Tensor(
        name,
        role,
        dtype,
        tuple(codes.shape),
        format.digest(codes, dtype),
        samples=min(SAMPLES, len(sample_positions(name, codes.size))) if large else None,
    )


def _within(case: Case, setting: Setting, met: list[Met]) -> dict[str, tuple[float, float, float]]:
    """name -> eight times the largest error of the zoo with the same scales, for every value."""
    recipe = recipe_of(case.arguments)
    values = {m.name: np.asarray(m.ours, np.float64).reshape(-1) for m in met if _is_number(m)}
    rows = {m.name: max(1, m.ours.size // m.ours.shape[-1]) for m in met if _is_number(m)}
    worst = {m.name: np.array(_once(m)) for m in met if _is_number(m)}
    for member in (member for member in RECIPE_ZOO if not member.scales):
        found = _run_by(member.arithmetic(recipe), case, setting)
        for name, ours in values.items():
            if name not in found:
                continue
            d = _measured(ours, np.asarray(found[name], np.float64).reshape(-1), (1.0, 1.0, 1.0))
            by_chance = d.spread / math.sqrt(rows[name])  # errors of a row have one cause, those of rows many
            worst[name] = np.maximum(worst[name], (d.excess, d.spread, max(d.bias_excess, by_chance)))
    return {name: _three(TIMES * found) for name, found in worst.items()}


def _once(m: Met) -> tuple[float, float, float]:
    kept_wide = m.name.startswith(("grad.", "after.")) and coded(m)[1] == "F32"
    return ONCE_F32 if kept_wide else ONCE


def _run_by(ar: Any, case: Case, setting: Setting) -> dict[str, Array]:
    outputs = programs.run(case.component, replace(setting, ar=ar))
    return {name: np.asarray(y) for name, y in outputs.items()}


def _is_number(m: Met) -> bool:
    return m.kind == VALUE and m.ours.dtype.kind == "f"


def _three(found: Array) -> tuple[float, float, float]:
    a, b, c = (float(f"{value:.2g}") for value in found)
    return a, b, c


def _certified(case: Case, expected: Mapping[str, Array]) -> Case:
    """With the proof that wrong outputs are rejected.  What the zoo's errors hide is no required output."""
    unfit: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    hidden: set[str] = set()
    for t in case.outputs:
        right = expected[t.name]
        for wrong, spoiled in exact.spoiled(right, t).items():
            if np.array_equal(spoiled, right):
                unfit.setdefault(t.name, {})[wrong] = "gives the right values"
                continue
            if t.within is not None:
                ours, theirs = (value_of(x, t.dtype).reshape(-1) for x in (right, spoiled))
                if distance(t, ours, theirs).holds:
                    hidden.add(t.name)
                    unfit.setdefault(t.name, {})[wrong] = "within the zoo's errors"
                    continue
            seen.add(wrong)
    rejects = {BITS: {wrong: "exact" for wrong in exact.WRONG if wrong in seen}}
    tensors = tuple(replace(t, role=PROBE) if t.name in hidden else t for t in case.tensors)
    if not any(t.role == REQUIRED for t in tensors):
        raise Invalid(f"case {case.id} has no required output that could be told from a wrong one.")
    return replace(case, tensors=tensors, certificate={"rejects": rejects, "not_applicable": unfit})
