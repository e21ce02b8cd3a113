"""Mistakes of the combination of experts, of SwiGLU and of gradients, against what the right parts give."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.programs import Outputs, Setting
from refimpl.validate.recomputed import FLOAT64
from refimpl.variants.mutants import MUTANTS

GOLDEN = Path(__file__).parent.parent.parent / "golden"


@cache
def setting(case: str) -> tuple[str, Setting]:
    folder = Folder.open(GOLDEN / case)
    return folder.case.component, setting_of(folder, FLOAT64)


@cache
def right(case: str) -> Outputs:
    component, s = setting(case)
    return programs.run(component, s)


def wrong(id: str, case: str) -> Outputs:
    component, s = setting(case)
    return programs.run(component, MUTANTS[id].change(s))


@pytest.mark.parametrize(("id", "factor"), [("G14a", 1 / 16), ("G14b", 16.0), ("G15", 0.0), ("X03a", 2.0)])
def test_the_shared_part_counts_so_often(id: str, factor: float) -> None:
    parts, path = right("moe/v2"), setting("moe/v2")[1].path
    routed, shared = parts[f"{path}.experts"], parts[f"{path}.shared_experts"]
    assert wrong(id, "moe/v2")[path] == pytest.approx(routed + factor * shared, rel=1e-12, abs=1e-14)


def test_a_lost_shared_expert_has_no_gradient() -> None:
    found = wrong("G15", "moe/v2-vjp")
    shared = [name for name in found if name.startswith("grad.") and "shared" in name]
    assert len(shared) == 3
    assert not any(found[name].any() for name in shared)


def test_x03b_has_the_experts_of_the_first_rank_only() -> None:
    case = "moe/experts"
    _, s = setting(case)
    slots, idx = right(case)[f"{s.path}.slots"], s.inputs["topk_idx"]
    weight = np.where(idx < 8, s.inputs["topk_weight"], 0.0)
    assert wrong("X03b", case)[s.path] == pytest.approx(
        (weight[..., None] * slots).sum(1), rel=1e-12, abs=1e-14
    )


@pytest.mark.parametrize("case", ["moe/experts-vjp", "moe/v2-vjp"])
def test_g20_is_the_same_up_to_rounding(case: str) -> None:
    ours, theirs, path = right(case), wrong("G20", case), setting(case)[1].path
    for name in [path, *(n for n in ours if n.startswith("grad."))]:
        assert np.abs(theirs[name] - ours[name]).max() <= 1e-12 * np.abs(ours[name]).max(), name


def test_g21_activates_the_other_half() -> None:
    case = "mlp/narrow-vjp"
    _, s = setting(case)
    gate, up = (s.inputs["x"] @ s.weights[f"{s.path}.{name}_proj.weight"].T for name in ("gate", "up"))
    found = wrong("G21", case)
    assert found[f"{s.path}.act"] == pytest.approx(gate * up / (1.0 + np.exp(-up)), rel=1e-10, abs=1e-12)
    assert found[f"{s.path}.gate_proj"] == pytest.approx(gate, rel=1e-10, abs=1e-12)


def test_l15_has_no_gradients_of_linears_and_the_right_ones_elsewhere() -> None:
    ours, theirs = right("mlp/narrow-vjp"), wrong("L15", "mlp/narrow-vjp")
    assert np.array_equal(ours["grad.x"], theirs["grad.x"])
    dropped = [name for name in theirs if name.startswith("grad.") and name.endswith("_proj.weight")]
    assert len(dropped) == 3
    assert not any(theirs[name].any() for name in dropped)


def test_l16_lacks_what_the_other_rank_s_experts_give() -> None:
    case = "moe/experts-vjp"
    component, s = setting(case)
    first = np.arange(6)[:, None] < 3
    local = first == (s.inputs["topk_idx"] < 8)  # (T, K)
    weight = np.where(local, s.inputs["topk_weight"], 0.0)
    kept = replace(s, inputs={**s.inputs, "topk_weight": weight})
    expected = programs.run(component, kept)["grad.x"]
    found = wrong("L16", case)
    assert found["grad.x"] == pytest.approx(expected, rel=1e-11, abs=1e-14)
    assert not np.allclose(found["grad.x"], right(case)["grad.x"])
    assert np.array_equal(found["grad.topk_weight"], right(case)["grad.topk_weight"])
