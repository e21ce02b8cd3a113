"""All mutants together: identity, and that each has the derivative of its own wrong forward.

The derivative along a random direction v in all inputs and weights is compared with a complex step: the
imaginary part of f(x + i h v) over h, with f the sum of cotangents times outputs and the loss.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import STEP, Complex

from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.programs import Outputs, Setting
from refimpl.validate.matrix import recorded, touched
from refimpl.validate.recomputed import FLOAT64
from refimpl.variants.catalogue import CATALOGUE
from refimpl.variants.mutants import EVERY, MUTANTS, balance, mtp, schedules, training
from refimpl.variants.mutants.mutant import ALL, Mutant
from refimpl.variants.variation import Change, operations, unchanged

GOLDEN = Path(__file__).parent.parent.parent / "golden"

TOLERANCE = 1e-9  # rounding in float64, where large terms cancel; a wrong term is of the size of 1
CASES = (  # backward cases with the routing given, the small ones first
    "norm/epsilon-vjp",
    "rope/yarn-vjp",
    "attention/causal-vjp",
    "attention/packed-vjp",
    "gate/tiny-scores-vjp",
    "gate/v2-groups-vjp",
    "gate/v3-vjp",
    "moe/experts-vjp",
    "moe/v2-vjp",
    "mla/no-query-latent-vjp",
    "mla/query-latent-vjp",
    "mla/packed-vjp",
    "embedding/vjp",
    "block/experts-vjp",
)
STRAIGHT = "a rounding, through which gradients pass as if it were not there"
ROUNDED = dict.fromkeys(("G03", "G17", "A12", "A16a", "A16b", "R05"), STRAIGHT)
BACKWARD = dict.fromkeys(("L15", "L16"), "a mistake of the backward pass alone")
SELECTION = {"G02", "G04", "G05", "G06", "G07b", "G16", "G18"}  # no trace where the routing is given
# Other constants, and X02c, which mixes up layers where a model has experts in every second one only.
CONSTANTS = {"A04c", "R01b", "R06c", "X02c", "Y02a", "Y04", "Y08"}  # no backward case shows the effect
ELSEWHERE = (
    *balance.MUTANTS,
    *mtp.MUTANTS,
    *training.MUTANTS,
    *schedules.MUTANTS,  # of gradients alone
)  # test_mutants_training.py has their derivatives
HERE = [mutant for mutant in MUTANTS.values() if mutant not in ELSEWHERE]
BY_ID = pytest.mark.parametrize("mutant", HERE, ids=lambda mutant: mutant.id)


@cache
def setting(case: str) -> tuple[str, Setting, Outputs, frozenset[str]]:
    folder = Folder.open(GOLDEN / case)
    own = setting_of(folder, FLOAT64)
    right, called = recorded(folder.case.component, own)
    return folder.case.component, own, right, frozenset(called)


def value(s: Setting, out: Outputs) -> complex:
    """The sum of the cotangents times their outputs, and the loss."""
    total = complex(out["loss"].sum()) if "loss" in out else 0.0
    for name, cotangent in s.inputs.items():
        if name == "dy":
            output = next(n for n in (s.path, f"{s.path}.topk_weight", f"{s.path}.heads") if n in out)
        elif name.startswith("d."):
            output = name.removeprefix("d.")
        elif name.startswith("d") and f"{s.path}.{name[1:]}" in out:
            output = f"{s.path}.{name[1:]}"
        else:
            continue
        total += complex((cotangent.reshape(-1) * np.asarray(out[output]).reshape(-1)).sum())
    return total


def differs(a: Outputs, b: Outputs) -> bool:
    return any(n not in b or not np.array_equal(v, b[n], equal_nan=True) for n, v in a.items())


def moved(s: Setting, along: dict[str, np.ndarray]) -> Setting:
    """The inputs and weights with an imaginary part, in the arithmetic that carries it."""

    def shift(arrays):
        return {n: a + 1j * STEP * along[n] if n in along else a for n, a in arrays.items()}

    return replace(s, ar=Complex(), inputs=shift(s.inputs), weights=shift(s.weights), backward=False)


def error(component: str, s: Setting, change: Change, found: Outputs, seed: int) -> float:
    """How far the derivative along a direction is from the complex step, relative to its terms."""
    rng = np.random.default_rng(seed)
    known = {**s.inputs, **s.weights}
    names = [n for n in known if f"grad.{n}" in found and known[n].dtype.kind == "f"]
    along = {n: rng.standard_normal(known[n].shape) * np.abs(known[n]).mean() for n in names}
    terms = np.array([float((found[f"grad.{n}"].reshape(-1) * along[n].reshape(-1)).sum()) for n in names])

    there = change(moved(s, along))
    numeric = value(there, programs.run(component, there)).imag / STEP
    return abs(numeric - float(terms.sum())) / float(np.abs(terms).max())


def first_changed(mutant: Mutant, forward: bool = True) -> tuple[str, Outputs] | None:
    """The first case of which it changes an output, with what it makes there."""
    for case in CASES:
        component, s, right, called = setting(case)
        changed = mutant.change(s)
        if not touched(s, changed, set(called)):
            continue
        found = programs.run(component, changed)
        ours = {n: v for n, v in right.items() if not (forward and n.startswith("grad."))}
        if differs(ours, found):
            return case, found
    return None


@BY_ID
def test_the_backward_is_the_derivative_of_the_wrong_forward(mutant: Mutant) -> None:
    if mutant.id in ROUNDED | BACKWARD:
        pytest.skip((ROUNDED | BACKWARD)[mutant.id])
    found = first_changed(mutant)
    if mutant.id in SELECTION | CONSTANTS:
        assert found is None
        return
    assert found is not None, "no backward case shows it"
    component, s, _, _ = setting(found[0])
    assert error(component, s, mutant.change, found[1], 3) < TOLERANCE, found[0]


@pytest.mark.parametrize("case", CASES)
def test_the_right_backward_passes_and_a_wrong_one_does_not(case: str) -> None:
    component, s, right, _ = setting(case)
    assert error(component, s, unchanged, right, 5) < TOLERANCE
    name = max((n for n in right if n.startswith("grad.")), key=lambda n: float(np.abs(right[n]).max()))
    assert error(component, s, unchanged, right | {name: 1.0001 * right[name]}, 5) > TOLERANCE


@pytest.mark.parametrize("id", sorted(BACKWARD))
def test_a_mistake_of_the_backward_pass_has_the_right_forward(id: str) -> None:
    assert first_changed(MUTANTS[id]) is None
    assert first_changed(MUTANTS[id], forward=False) is not None


def test_ids_are_those_of_the_catalogue_and_a_letter() -> None:
    assert {mutant.entry for mutant in EVERY.values()} <= CATALOGUE.keys()
    for mutant in EVERY.values():
        assert mutant.id == mutant.entry + mutant.id[3:]
        assert mutant.id[3:] == "" or mutant.id[3:] in "abcdef"
    lone = {m.entry for m in EVERY.values() if m.id[3:] == ""}
    assert not lone & {m.entry for m in EVERY.values() if m.id[3:]}


def test_claims_are_some_of_all_from_the_strictest_on() -> None:
    assert all(mutant.claims == ALL[: len(mutant.claims)] and mutant.claims for mutant in MUTANTS.values())


def test_what_is_benign_is_so_in_the_catalogue() -> None:
    for mutant in EVERY.values():
        if mutant.benign:
            assert CATALOGUE[mutant.entry].visibility == "benign" or mutant.id == "G20"


def test_the_oracle_without_mscale_is_the_missing_mscale() -> None:
    """Y11 was compared with a library whose scale is (P + R)^(-1/2): that is Y07."""

    def scale(config, choices) -> float:
        return float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)

    library = operations(softmax_scale=lambda ops: scale)
    assert CATALOGUE["Y11"].refers == "Y07"
    for case in (
        "attention/causal-vjp",
        "mla/query-latent-vjp",
        "mla/packed-vjp",
        "model/tiny-v3-forced-vjp",
    ):
        component, s, right, _ = setting(case)
        theirs, own = (programs.run(component, c(s)) for c in (library, MUTANTS["Y07"].change))
        assert differs(right, own)
        for name, found in own.items():
            near = np.isfinite(found)
            a, b = theirs[name][near], found[near]
            assert np.abs(a - b).max() <= 1e-11 * np.abs(b).max(), name
