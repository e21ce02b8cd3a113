"""An output of a port against a case of a recipe, stage by stage.  SPEC VERDICT-22.

The case is computed again, going on with the port's tensors wherever it gave them.  So codes are judged as
made from the port's own values, products from the port's own codes, and what is wrong is found where it is.
Codes with their scales, and products, have to be the bits of the recipe's rule or of one that is as right; of
a product the note says whose they are.  A product of an unknown unit holds within eight times what the known
ones are apart.  Values hold within the three numbers of their tensor.

A port that gives neither codes nor products says nothing of how it makes scales: its values have to hold with
one of the rules that are as right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from refimpl.cases import staged
from refimpl.cases.folder import Folder
from refimpl.cases.format import Tensor
from refimpl.cases.setting import setting_of
from refimpl.numerics.arithmetic import Array, Exact
from refimpl.recipe_programs import CODES, PRODUCT, SCALES, Met
from refimpl.validate.tensor import HOLDS, OFF, TensorVerdict

_OF_GEMMS: Final = (".codes", ".codes_scale", ".a", ".a_scale", ".b", ".b_scale", ".d")  # ends of names
OPERANDS: Final = {"fprop": ("x", "w"), "dgrad": ("dy", "w^T"), "wgrad": ("dy^T", "x^T")}


def judge(folder: Folder, usable: Mapping[str, tuple[Tensor, Array]]) -> dict[str, TensorVerdict]:
    """usable: output -> (tensor, the port's codes, or numbers as float64)  ->  name -> verdict.

    Raises Unreadable.
    """
    case = folder.case
    theirs = {name: _numbers(t, codes) for name, (t, codes) in usable.items()}
    recipes = staged.recipes_of(case)
    if any(name.endswith(_OF_GEMMS) for name in usable):
        recipes = recipes[:1]
    setting = setting_of(folder, Exact())
    first: dict[str, TensorVerdict] = {}
    for recipe in recipes:
        found = _judged(staged.computed(case, setting, theirs, recipe), usable)
        if not _off(found):
            return found
        first = first or found
    return first


def _off(found: Mapping[str, TensorVerdict]) -> bool:
    return any(verdict.verdict == OFF for verdict in found.values())


def _judged(met: list[Met], usable: Mapping[str, tuple[Tensor, Array]]) -> dict[str, TensorVerdict]:
    by_name = {m.name: m for m in met}
    found: dict[str, TensorVerdict] = {}
    for m in met:
        if m.name not in usable:
            continue
        t = usable[m.name][0]
        if m.kind in (CODES, SCALES):
            found[m.name] = _codes(t, m, by_name)
        elif m.kind == PRODUCT:
            found[m.name] = _product(t, m)
        else:
            found[m.name] = _value(t, m)
    return found


def _numbers(t: Tensor, codes: Array) -> Array:
    if codes.dtype.kind == "f":
        with np.errstate(over="ignore"):  # then it is infinite, and off
            return codes.astype(np.float32)
    if t.dtype.startswith(("F8", "U")):
        return codes
    value = staged.value_of(codes, t.dtype)
    return value.astype(np.float32) if t.dtype in ("F32", "BF16") else value


def _codes(t: Tensor, m: Met, by_name: Mapping[str, Met]) -> TensorVerdict:
    """Codes and their scales hold together: both have to be of one rule."""
    assert m.theirs is not None
    pair = [m]
    other = by_name.get(m.name.removesuffix("_scale") if m.kind == SCALES else f"{m.name}_scale")
    if other is not None and other.theirs is not None:
        pair.append(other)
    if _same(m.ours, m.theirs):
        return TensorVerdict(t.name, t.role, HOLDS)
    alternatives = [part.others() for part in pair]
    for rule in alternatives[0]:
        if all(_same(made[rule], part.theirs) for made, part in zip(alternatives, pair, strict=True)):
            return TensorVerdict(t.name, t.role, HOLDS, f"as {rule} makes them")
    return _differs(t, m.ours, m.theirs)


def _product(t: Tensor, m: Met) -> TensorVerdict:
    assert m.theirs is not None
    if _same(m.ours, m.theirs):
        return TensorVerdict(t.name, t.role, HOLDS)
    others = m.others()
    units = [unit for unit, made in others.items() if _same(made, m.theirs)]
    if units:
        return TensorVerdict(t.name, t.role, HOLDS, f"accumulated as {' or '.join(units)}")
    exact = others.get("exact", m.ours).astype(np.float64)
    apart = [np.abs(made - exact) for made in (m.ours, *others.values())]
    allowed = staged.TIMES * np.max([own.max(-1, keepdims=True) for own in apart], axis=0)
    error = np.abs(m.theirs - exact)
    far = ~(error <= allowed)  # NaN is far
    if not far.any():
        return TensorVerdict(t.name, t.role, HOLDS, "accumulated as accurately as the known units")
    return _differs(t, m.ours, m.theirs, far, "are further from the exact product than known units")


def _value(t: Tensor, m: Met) -> TensorVerdict:
    assert m.theirs is not None
    if m.ours.dtype.kind in "iu":
        return (
            TensorVerdict(t.name, t.role, HOLDS) if _same(m.ours, m.theirs) else _differs(t, m.ours, m.theirs)
        )
    ours, theirs = (np.asarray(x, np.float64).reshape(-1) for x in (m.ours, m.theirs))
    d = staged.distance(t, ours, theirs)
    at = tuple(int(i) for i in np.unravel_index(d.at, t.shape))
    return TensorVerdict(t.name, t.role, HOLDS if d.holds else OFF, d.reason, at, d)


def words(name: str) -> str:
    """What a tensor of a GEMM is: "codes of dy^T as Wgrad reads it"."""
    own = name.removesuffix(".again")
    what = "scales" if own.endswith("_scale") else "codes"
    site, _, part = own.removesuffix("_scale").rpartition(".")
    gemm = site.rpartition(".")[2]
    if gemm not in OPERANDS:
        return f"{what} of the value" if part == "codes" else "value"
    if part == "d":
        return f"what {gemm.capitalize()} adds up"
    return f"{what} of {OPERANDS[gemm]['ab'.index(part)]} as {gemm.capitalize()} reads it"


def _same(ours: Array, theirs: Array | None) -> bool:
    return theirs is not None and np.array_equal(ours, theirs)


def _differs(
    t: Tensor, ours: Array, theirs: Array, wrong: Array | None = None, how: str = "differ"
) -> TensorVerdict:
    """wrong: which elements are; those that are not equal if it is None."""
    off = np.flatnonzero(ours != theirs if wrong is None else wrong)
    at = tuple(int(i) for i in np.unravel_index(int(off[0]), t.shape))
    shown = "{:#04x} instead of {:#04x}" if t.dtype.startswith(("F8", "U")) else "{} instead of {}"
    first = shown.format(theirs[at], ours[at])
    text = f"{words(t.name)}: {off.size} of {t.size} elements {how}, the first is {first} at {at}"
    return TensorVerdict(t.name, t.role, OFF, text, at)
