"""Mistakes of rotary positions: what they change, and their derivatives."""

import numpy as np
import pytest
from changed import GOLDEN, differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.cases.folder import Folder
from refimpl.numerics.formats import BF16, round_to
from refimpl.variants.mutants.rope import MUTANTS

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
PATH = "model.layers.3.self_attn"
ROUNDED = (
    "R04b",
    "R05",
)  # their tables, which the complex step does not go through; they are tested as adjoints


@pytest.mark.parametrize("case", ["rope/yarn-vjp", "rope/halves-vjp"])
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.id not in ROUNDED], ids=lambda m: m.id)
def test_the_backward_is_the_derivative_of_the_forward(mutant, case: str) -> None:
    assert gradient_error(case, mutant.change) < TOLERANCE


@pytest.mark.parametrize("id", ["R04a", "R04b", "R04c", "R04d", "R05", "R06a", "R06b"])
def test_with_other_tables_the_backward_is_the_adjoint(id: str) -> None:
    case = "rope/yarn-vjp"
    found = outputs(case, BY_ID[id].change)
    right = outputs(case)
    for name in ("q_pe", "k_pe"):
        x, dy = _given(case, name), _given(case, f"d{name}")
        left, other = (dy * found[f"{PATH}.{name}"]).sum(), (found[f"grad.{name}"] * x).sum()
        assert abs(left - other) < TOLERANCE * np.abs(dy * x).sum()
        assert not np.allclose(found[f"grad.{name}"], right[f"grad.{name}"])


def _given(case: str, name: str):
    folder = Folder.open(GOLDEN / case)
    return folder.given(folder.case.tensor(name))


def test_halves_are_rotated_where_pairs_are_neighbours_and_the_other_way_round() -> None:
    assert differing("rope/yarn", BY_ID["R01a"].change) == ["q_pe", "k_pe"]
    assert differing("rope/halves", BY_ID["R01a"].change) == []
    assert differing("rope/yarn", BY_ID["R01b"].change) == []
    assert differing("rope/halves", BY_ID["R01b"].change) == ["q_pe", "k_pe"]


def test_a_table_for_halves_gives_element_i_the_angle_i_modulo_half() -> None:
    case = "rope/yarn"
    tables = outputs("rope/tables-yarn")
    cos, sin = (np.tile(tables[f"{PATH}.{n}"], 2)[:, None] for n in ("cos", "sin"))  # cat(f, f)
    x = _given(case, "q_pe")
    swapped = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)  # rotate_every_two
    assert np.allclose(
        outputs(case, BY_ID["R02a"].change)[f"{PATH}.q_pe"], x * cos + swapped * sin, atol=1e-14
    )


def test_only_the_key_is_rotated_in_halves() -> None:
    assert differing("rope/yarn", BY_ID["R02b"].change) == ["k_pe"]


def test_two_permuted_sides_change_only_how_they_are_stored() -> None:
    right, changed = outputs("rope/yarn"), outputs("rope/yarn", BY_ID["R03"].change)
    for name in right:
        halves = np.concatenate([right[name][..., 0::2], right[name][..., 1::2]], -1)
        assert np.array_equal(changed[name], halves)
    assert differing("mla/packed-vjp", BY_ID["R03"].change) == ["q_pe", "k_pe"]
    assert differing("rope/yarn-vjp", BY_ID["R03"].change) == ["q_pe", "k_pe"]


def test_angles_in_bfloat16_are_off_as_was_measured() -> None:
    right = outputs("rope/tables-plain")[f"{PATH}.cos"]
    off = np.abs(outputs("rope/tables-plain", BY_ID["R04a"].change)[f"{PATH}.cos"] - right).max(1)
    assert off[0] == 0.0  # position 0
    assert 0.01 < off[5] < 0.2  # position 300
    assert off[6] > 0.3  # position 4000
    assert differing("rope/tables-plain", BY_ID["R04a"].change) == ["cos", "sin"]


def test_products_in_bfloat16_are_rounded_after_the_multiplication() -> None:
    tables = outputs("rope/tables-plain")
    places = _given("rope/tables-plain", "position_ids")[:, None]
    angle = round_to(places * tables[f"{PATH}.inv_freq"], BF16)
    changed = outputs("rope/tables-plain", BY_ID["R04b"].change)
    assert np.allclose(changed[f"{PATH}.cos"], np.cos(angle), atol=1e-15)


def test_tables_in_bfloat16_are_off_by_at_most_a_rounding() -> None:
    right, changed = outputs("rope/tables-yarn"), outputs("rope/tables-yarn", BY_ID["R05"].change)
    off = np.abs(changed[f"{PATH}.cos"] - right[f"{PATH}.cos"])
    assert 1e-3 < off.max() <= 2.0**-9
    assert "bf16" not in BY_ID["R05"].claims


def test_positions_in_16_bits_stop_or_wrap() -> None:
    right = outputs("rope/tables-yarn")[f"{PATH}.cos"]
    for id in ("R06a", "R06b"):
        changed = outputs("rope/tables-yarn", BY_ID[id].change)[f"{PATH}.cos"]
        same = (changed == right).all(1)
        assert same.tolist() == [True] * 8 + [False] * 2, id  # 40001 and 131071 do not fit
    assert differing("rope/tables-yarn", BY_ID["R06c"].change) == []  # 4096 does
