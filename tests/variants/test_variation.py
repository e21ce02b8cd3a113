"""Changes to what a program computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.layers.context import Op
from refimpl.numerics.arithmetic import Exact
from refimpl.numerics.floating import Floating
from refimpl.numerics.formats import BF16, round_to
from refimpl.variants import variation

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def outputs(case: str, change=variation.unchanged, ar=None):
    folder = Folder.open(GOLDEN / case)
    return programs.run(folder.case.component, change(setting_of(folder, ar or Floating(np.float64))))


@pytest.mark.parametrize(
    "case", ["norm/epsilon-vjp", "gate/v3-vjp", "rope/yarn", "mlp/narrow-vjp", "model/tiny-v2-forced"]
)
def test_a_stored_case_computes_its_expected_values_again(case: str) -> None:
    folder = Folder.open(GOLDEN / case)
    found = outputs(case, ar=Exact())
    for t in folder.case.outputs:
        judged, index = folder.judged(t)
        flat = np.asarray(found[t.name]).reshape(-1)
        assert np.array_equal(judged, flat if index is None else flat[index], equal_nan=True), t.name


def test_a_permuted_weight_has_its_gradient_back_in_place() -> None:
    swapped = variation.stored("*.gate_proj.weight", lambda w: w[::-1], lambda g: g[::-1])
    twice = variation.both(swapped, swapped)
    right, again = outputs("mlp/narrow-vjp"), outputs("mlp/narrow-vjp", twice)
    name = next(n for n in right if n.endswith("gate_proj.weight"))
    assert np.array_equal(right[name], again[name])
    assert not np.array_equal(right[name], outputs("mlp/narrow-vjp", swapped)[name])


def test_a_rounded_site_rounds_there_only() -> None:
    change = variation.rounded(BF16, "norm.out")
    right, changed = outputs("norm/hidden"), outputs("norm/hidden", change)
    assert {n: round_to(x, BF16).tolist() for n, x in right.items()} == {
        n: x.tolist() for n, x in changed.items()
    }


def test_changes_are_made_one_after_the_other() -> None:
    def doubled(ops):
        def forward(*args):
            y, saved = ops.norm.forward(*args)
            return 2.0 * y, replace(saved, out=2.0 * y)

        return Op(forward, ops.norm.backward)

    twice = variation.both(variation.operations(norm=doubled), variation.operations(norm=doubled))
    right, changed = outputs("norm/hidden"), outputs("norm/hidden", twice)
    assert all(np.array_equal(4.0 * x, changed[name]) for name, x in right.items())
