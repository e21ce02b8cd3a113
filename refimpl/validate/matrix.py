"""Which known mistake is caught by which case, and by how much.  SPEC CASE-16.

Every mutant is run in float64 on every case of numbers, and on the cases of bits whose component it names;
what it changes is judged as the output of a port would be, of which only the required tensors are there.  A
factor above 1 is a kill.  `matrix` finds the factors, `outcome` says what they come to for one mutant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from refimpl import programs
from refimpl.cases import exact, format, instruments, staged
from refimpl.cases.claims import BITS, CLAIMS, PARTS, Claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import INPUT, REQUIRED, Case, Tensor
from refimpl.cases.generate import over
from refimpl.cases.judge import worst_excess
from refimpl.cases.judging import Reference
from refimpl.cases.setting import setting_of
from refimpl.cases.suites import SUITES
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.errors import Error, Invalid
from refimpl.layers.context import Op, Ops
from refimpl.numerics.arithmetic import Array
from refimpl.programs import Outputs, Setting
from refimpl.recipe_programs import Noting
from refimpl.validate import stagewise
from refimpl.validate.output import Output
from refimpl.validate.recomputed import FLOAT64, Remembered
from refimpl.validate.tensor import OFF, TensorVerdict
from refimpl.validate.verdict import of_numbers
from refimpl.variants.mutants import BITS_MUTANTS, EVERY, MUTANTS
from refimpl.variants.mutants.bits import BitsMutant
from refimpl.variants.mutants.mutant import Mutant

ENOUGH: Final = 10.0  # the factor that is asked for
CAP: Final = 1e6
SAME: Final = 1e-12  # of the largest element: what another order of the same sums may change

Factors = dict[str, dict[str, dict[str, float]]]  # mutant -> case -> claim -> factor
Exceeded = dict[str, dict[str, float]]  # mutant -> claim -> factor, of one case


@dataclass(frozen=True)
class Outcome:
    """What the matrix says about a mutant.

    strictest: the first of its claims; killed: cases that reject it there; case, factor: the one that does so
    most clearly; survives: claims at which it is a mistake and no case rejects it; wronged: of a benign one,
    the cases that reject it.
    """

    mutant: Mutant | BitsMutant
    strictest: str
    applies: int
    killed: int
    case: str
    factor: float
    survives: tuple[str, ...]
    wronged: tuple[str, ...]

    @property
    def fault(self) -> str:
        """What is wrong with the suites, or ""."""
        if self.mutant.benign:
            return f"is benign and is rejected by {', '.join(self.wronged)}" if self.wronged else ""
        if not self.killed:
            return f"survives at {self.strictest}"
        if self.factor < ENOUGH and not self.mutant.small:
            return f"is rejected by a factor of {self.factor:.1f} only"
        return ""


def claims_of(mutant: Mutant | BitsMutant) -> tuple[str, ...]:
    """The claims at which it is a mistake, the strictest first."""
    return (BITS,) if isinstance(mutant, BitsMutant) else mutant.claims


def known(ids: Iterable[str]) -> tuple[str, ...]:
    """The mutants of these ids: an entry's id names all its readings.  Raises Invalid for unknown ones."""
    found: list[str] = []
    for id in ids:
        own = [m.id for m in EVERY.values() if id in (m.id, m.entry)]
        if not own:
            raise Invalid(f"mutant {id[:60]!r} is unknown, but it must be one of {', '.join(EVERY)}.")
        found += own
    return tuple(dict.fromkeys(found))


def chosen(root: Path, suites: Sequence[str]) -> list[Path]:
    """The cases of suites, all by default.  Raises Unreadable, and Invalid for a suite without cases."""
    paths = format.cases(root, suites)
    for name in {*suites} - {path.parent.name for path in paths}:
        raise Invalid(f"suite {name[:60]!r} has no case in {root}; {', '.join(SUITES)} are suites.")
    return paths


def matrix(
    paths: Iterable[Path],
    ids: Iterable[str] = (),
    jobs: int = 1,
    done: Callable[[str], None] = lambda id: None,
) -> Factors:
    """Run mutants (all by default) on the cases of these folders.  done(case) is called after each.

    Raises Unreadable for a folder that is no case.
    """
    wanted = tuple(ids) or tuple(EVERY)
    found: Factors = {id: {} for id in wanted}
    work: list[tuple[object, ...]] = [(str(path), wanted) for path in paths]
    for (case, exceeded), _ in over(of_case, work, jobs):
        for id, factors in exceeded.items():
            found[id][case] = factors
        done(case)
    return {id: dict(sorted(cases.items())) for id, cases in found.items()}


def of_case(path: str, ids: tuple[str, ...]) -> tuple[str, Exceeded]:
    """(the case's id, the factors of the mutants that apply to it).  Raises Unreadable."""
    folder = Folder.open(path)
    case = folder.case
    if case.by_bits:
        return case.id, _of_bits(folder, ids) if case.fingerprint is None else {}
    return case.id, _of_numbers(folder, ids) if case.outcome != "reject" else {}


def outcome(mutant: Mutant | BitsMutant, cases: Mapping[str, Mapping[str, float]]) -> Outcome:
    """From the factors of a mutant, by case and claim."""
    claims = claims_of(mutant)
    at = {case: factors[claims[0]] for case, factors in cases.items() if claims[0] in factors}
    best = max(at, key=lambda case: at[case], default="")
    return Outcome(
        mutant,
        claims[0],
        len(cases),
        sum(factor > 1.0 for factor in at.values()),
        best,
        at.get(best, 0.0),
        tuple(c for c in claims if not any(f.get(c, 0.0) > 1.0 for f in cases.values())),
        tuple(
            case for case, f in cases.items() if mutant.benign and any(value > 1.0 for value in f.values())
        ),
    )


def _of_numbers(folder: Folder, ids: tuple[str, ...]) -> Exceeded:
    case, reference = folder.case, Remembered(folder)
    if not any(id in MUTANTS for id in ids):
        return {}
    setting = setting_of(folder, FLOAT64)
    required = [t for t in case.outputs if t.role == REQUIRED]
    right, called = recorded(case.component, setting)
    found: Exceeded = {}
    for id in ids:
        mutant = MUTANTS.get(id)
        if mutant is None:
            continue
        try:
            changed = mutant.change(setting)
            if not touched(setting, changed, called):
                continue
            with np.errstate(all="ignore"):
                wrong = programs.run(case.component, changed)
        except Error:
            continue  # the changed configuration is none
        given = {t.name: np.asarray(wrong[t.name]) for t in required if t.name in wrong}
        if all(_unchanged(t, right, given, mutant.benign) for t in required):
            continue
        theirs = Output(case, cast(TensorFile, _Given(given)))
        offered = [CLAIMS[name] for name in case.claims if mutant.benign or name in mutant.claims]
        found[id] = {claim.name: _factor(reference, theirs, claim) for claim in offered}
    return found


def recorded(component: str, setting: Setting) -> tuple[Outputs, set[str]]:
    """What the setting computes, and the names of the operations that it calls."""
    called: set[str] = set()

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*arguments: Any) -> Any:
            called.add(name)
            return call(*arguments)

        return recording

    made: dict[str, Any] = {}
    for field in fields(Ops):
        op = getattr(setting.ops, field.name)
        if isinstance(op, Op):
            made[field.name] = Op(noting(field.name, op.forward), noting(field.name, op.backward))
        else:
            made[field.name] = noting(field.name, op)
    return programs.run(component, replace(setting, ops=Ops(**made))), called


def touched(setting: Setting, changed: Setting, called: set[str]) -> bool:
    """Whether the change can show: False only where nothing but operations that are not called is other."""
    same = replace(changed, ops=setting.ops)
    if any(getattr(same, f.name) is not getattr(setting, f.name) for f in fields(Setting)):
        return True
    return any(getattr(changed.ops, name) is not getattr(setting.ops, name) for name in called)


def _unchanged(t: Tensor, right: Mapping[str, Any], given: Mapping[str, Array], bitwise: bool) -> bool:
    ours, theirs = np.asarray(right[t.name]), given.get(t.name)
    if theirs is None or theirs.size != ours.size:
        return False
    ours = ours.reshape(theirs.shape)
    if np.array_equal(ours, theirs, equal_nan=True):
        return True
    if bitwise or t.dtype == "I64" or not np.isfinite(theirs).all():
        return False
    return bool(np.abs(theirs - ours).max() <= SAME * np.abs(ours).max())


def _factor(reference: Reference, theirs: Output, claim: Claim) -> float:
    """By what the worst of the required tensors exceeds what it may; at most 1 if all hold."""
    verdict = of_numbers(reference, theirs, claim)
    return max(_excess(reference, t, theirs, claim) for t in verdict.tensors if t.role == REQUIRED)


def _excess(reference: Reference, v: TensorVerdict, theirs: Output, claim: Claim) -> float:
    if not v.bad:
        return worst_excess(v.distance) if v.distance is not None else 0.0
    t = reference.case.tensor(v.name)
    if v.verdict == OFF and t.set:
        return _margin(reference, t, theirs.array(t), claim)
    return worst_excess(v.distance) if v.distance is not None else math.inf


def _margin(reference: Reference, t: Tensor, theirs: Array, claim: Claim) -> float:
    """The largest margin of a wrong row, over what the claim leaves in doubt there."""
    margin, wide = reference.extra(t, "margin"), t.shape[-1]
    if margin is None:
        return math.inf
    doubt = np.zeros(margin.shape)
    for u, part in zip(claim.roundoffs, PARTS, strict=True):
        own = reference.extra(t, f"doubt.{part}")
        doubt = doubt if own is None else doubt + u * own
    ours = np.sort(reference.judged(t)[0].reshape(-1, wide), -1)
    wrong = (ours != np.sort(theirs.reshape(-1, wide), -1)).any(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(wrong, margin / (2.0 * doubt), 0.0).max())


@dataclass(frozen=True)
class _Given:
    """Arrays as a file of them: what `Output` asks of one."""

    arrays: Mapping[str, Array]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __iter__(self) -> Any:
        return iter(self.arrays)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def dtype(self, name: str) -> str:
        return "I64" if self.arrays[name].dtype.kind == "i" else "F64"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape


def _of_recipe(folder: Folder, ids: tuple[str, ...]) -> Exceeded:
    """Of a case of a recipe: the required outputs of the recipe with the mistake, and nothing between."""
    case, setting = folder.case, setting_of(folder, FLOAT64)
    recipe = staged.recipe_of(case.arguments)
    found: Exceeded = {}
    required = {t.name: t for t in case.outputs if t.role == REQUIRED}
    right = programs.run(case.component, replace(setting, ar=Noting(recipe)))
    for id in ids:
        mutant = BITS_MUTANTS.get(id)
        if mutant is None or mutant.recipe is None:
            continue
        wrong = programs.run(case.component, replace(setting, ar=mutant.recipe(recipe)))
        if all(np.array_equal(wrong[name], right[name]) for name in required):
            continue
        usable = {name: (t, staged.stored_as(wrong[name], t.dtype)) for name, t in required.items()}
        off = any(v.verdict == OFF for v in stagewise.judge(folder, usable).values())
        found[id] = {BITS: math.inf if off else 0.0}
    return found


def _of_bits(folder: Folder, ids: tuple[str, ...]) -> Exceeded:
    case = folder.case
    if staged.is_staged(case):
        return _of_recipe(folder, ids)
    mutants = [BITS_MUTANTS[id] for id in ids if id in BITS_MUTANTS]
    mutants = [mutant for mutant in mutants if case.component in mutant.runs]
    if not mutants:
        return {}
    inputs = [t for t in case.tensors if t.role == INPUT]
    data = instruments.Data(
        {t.name: folder.given_codes(t) for t in inputs}, {t.name: t.dtype for t in inputs}, case.arguments
    )
    found: Exceeded = {}
    for mutant in mutants:
        with np.errstate(all="ignore"):
            wrong = mutant.runs[case.component](data)
        if _wrong(folder, case, wrong):
            found[mutant.id] = {BITS: math.inf}
    return found


def _wrong(folder: Folder, case: Case, given: Mapping[str, Array]) -> bool:
    """Whether the verdict rejects these outputs, with the right ones where there is none."""
    for t in case.outputs:
        if t.role == REQUIRED and t.name in given:
            codes = exact.stored(np.ascontiguousarray(given[t.name]), t.dtype, t.any_nan is not None)
            ours, positions = folder.judged_codes(t)
            if codes.shape != t.shape or not exact.compare(t, ours, positions, codes).holds:
                return True
    return False
