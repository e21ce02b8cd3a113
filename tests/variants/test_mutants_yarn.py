"""Mistakes of YaRN: the sizes that were measured in real ports, and derivatives where scales have one."""

import math

import numpy as np
import pytest
from changed import differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.variants.mutants.mla import MUTANTS as MLA
from refimpl.variants.mutants.yarn import MUTANTS

BY_ID = {mutant.id: mutant for mutant in (*MUTANTS, *MLA)}
PATH = "model.layers.3.self_attn"
G = 0.1 * math.log(40.0) + 1.0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_the_backward_is_the_derivative_of_the_forward(mutant) -> None:
    assert gradient_error("attention/packed-vjp", mutant.change) < TOLERANCE
    assert gradient_error("rope/yarn-vjp", mutant.change) < TOLERANCE


@pytest.mark.parametrize(
    ("id", "ratio"),
    [
        ("Y07", 0.534),
        ("Y09a", 0.7305),
        ("Y09b", 1.874),
        ("Y10", 0.574),
        ("A01", 0.577),
        ("Y08", 1.0),
        ("Y01", 1.0),
    ],
)
def test_logits_are_off_by_the_ratio_that_was_measured(id: str, ratio: float) -> None:
    name = f"{PATH}.softmax_scale"
    found = outputs("rope/tables-yarn", BY_ID[id].change)[name]
    own = found / outputs("rope/tables-yarn")[name]

    assert abs(own - ratio) < 5e-4


def test_a_short_run_has_no_yarn_when_its_own_length_decides() -> None:
    off = differing("attention/causal", BY_ID["Y02b"].change)
    assert off == ["scores", "probs", "heads"]
    right, changed = (
        outputs("attention/causal", m)[f"{PATH}.scores"] for m in (lambda s: s, BY_ID["Y02b"].change)
    )
    seen = np.isfinite(right)
    assert np.allclose(changed[seen] * G * G, right[seen], rtol=1e-12)


def test_a_length_that_is_taken_for_4096_never_has_yarn() -> None:
    off = ["inv_freq", "cos", "sin", "softmax_scale"]
    assert differing("rope/tables-yarn", BY_ID["Y02c"].change) == off
    assert differing("rope/tables-yarn", BY_ID["Y02b"].change) == []  # its positions are beyond
    assert differing("rope/tables-yarn-short", BY_ID["Y02c"].change) == []


def test_yarn_that_should_not_apply_is_seen_where_a_length_is_chosen() -> None:
    assert differing("rope/tables-yarn", BY_ID["Y02a"].change) == []
    assert differing("rope/tables-yarn-short", BY_ID["Y02a"].change) == [
        "inv_freq",
        "cos",
        "sin",
        "softmax_scale",
    ]


def test_mscale_is_not_mscale_all_dim_only_where_they_differ() -> None:
    name = f"{PATH}.softmax_scale"
    assert differing("rope/tables-yarn", BY_ID["Y08"].change) == []
    right, changed = (
        outputs("rope/tables-yarn-unequal", m)[name] for m in (lambda s: s, BY_ID["Y08"].change)
    )
    other = 0.1 * 0.707 * math.log(40.0) + 1.0
    assert np.allclose(changed / right, (G / other) ** 2, rtol=1e-12)


def test_frequencies_differ_where_they_should() -> None:
    name = f"{PATH}.inv_freq"
    right = outputs("rope/tables-yarn")[name]
    ratio = {
        id: outputs("rope/tables-yarn", BY_ID[id].change)[name] / right for id in ("Y01", "Y03", "Y04", "Y05")
    }
    assert np.flatnonzero(np.abs(ratio["Y01"] - 1) > 1e-12).tolist() == list(range(11, 32))
    assert np.allclose(ratio["Y01"][23:], 40.0)
    assert np.flatnonzero(np.abs(ratio["Y03"] - 1) > 1e-12).tolist() == list(range(11, 23))
    assert np.allclose(ratio["Y04"], 1.0, rtol=1e-15)  # the ramp ends at 23, before 31
    j = np.arange(23, 32)
    assert np.allclose(ratio["Y05"][23:], 40.0 / 40.0 ** (2 * j / 64), rtol=1e-12)


def test_cos_and_sin_are_scaled_by_g() -> None:
    right, changed = outputs("rope/tables-yarn"), outputs("rope/tables-yarn", BY_ID["Y06"].change)
    assert np.allclose(changed[f"{PATH}.cos"], right[f"{PATH}.cos"] * G, rtol=1e-12)
    assert np.array_equal(changed[f"{PATH}.softmax_scale"], right[f"{PATH}.softmax_scale"])


def test_a_benign_clamp_says_so() -> None:
    assert BY_ID["Y04"].benign
