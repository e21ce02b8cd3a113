"""What the tests of mutants share: small stored cases, changed and run; derivatives by a complex step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from support import COMPLEX, FLOAT64, STEP

from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.programs import Outputs
from refimpl.variants.variation import Change, unchanged

GOLDEN = Path(__file__).parent.parent / "golden"


def outputs(case: str, change: Change = unchanged) -> Outputs:
    """The case in float64, changed."""
    folder = Folder.open(GOLDEN / case)
    return programs.run(folder.case.component, change(setting_of(folder, FLOAT64)))


def differing(case: str, change: Change) -> list[str]:
    """The outputs that the change changes, last parts of their names, in the order of computation."""
    right, changed = outputs(case), outputs(case, change)
    assert list(right) == list(changed)
    path = Folder.open(GOLDEN / case).case.path
    off = [n for n in right if not np.allclose(right[n], changed[n], rtol=1e-12, atol=1e-12, equal_nan=True)]
    return [name.removeprefix(f"{path}.") for name in off]


def gradient_error(case: str, change: Change, seed: int = 0) -> float:
    """How far the gradients of a changed case are from a complex step through the changed forward, over the
    size of the summed terms; every given array is moved at once, along a random direction."""
    folder, rng = Folder.open(GOLDEN / case), np.random.default_rng(seed)
    plain, stepped = setting_of(folder, FLOAT64), setting_of(folder, COMPLEX)
    cotangents = {n for n in plain.inputs if n in ("dy", "dq_pe", "dk_pe")}
    found, terms = programs.run(folder.case.component, change(plain)), []

    def moved(name, value):
        if name in cotangents or not np.issubdtype(value.dtype, np.floating):
            return value
        if f"grad.{name}" not in found:  # the selection bias
            return value
        direction = value.std() * rng.standard_normal(value.shape)
        terms.append((np.asarray(found[f"grad.{name}"]).reshape(value.shape) * direction).reshape(-1))
        return value + 1j * STEP * direction

    inputs = {name: moved(name, value) for name, value in stepped.inputs.items()}
    weights = {name: moved(name, value) for name, value in stepped.weights.items()}
    stepped = change(replace(stepped, inputs=inputs, weights=weights, backward=False))
    out = programs.run(folder.case.component, stepped)
    derivative = sum(
        (
            stepped.inputs[name]
            * out[_of(name, folder.case.path, out)].imag.reshape(stepped.inputs[name].shape)
        ).sum()
        for name in cotangents
    )
    every = np.concatenate(terms)
    return float(abs(every.sum() - derivative / STEP) / np.sqrt((every**2).sum()))


def _of(cotangent: str, path: str, out: Outputs) -> str:
    """The output that a cotangent belongs to."""
    if cotangent != "dy":
        return f"{path}.{cotangent.removeprefix('d')}"
    return path if path in out else f"{path}.heads"
