"""Mistakes of latent attention: what they change, and their derivatives."""

import numpy as np
import pytest
from changed import differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.variants.mutants.mla import MUTANTS

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
PATH = "model.layers.3.self_attn"


@pytest.mark.parametrize("case", ["mla/packed-vjp", "mla/no-query-latent-vjp"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_the_backward_is_the_derivative_of_the_forward(mutant, case: str) -> None:
    assert gradient_error(case, mutant.change) < TOLERANCE


@pytest.mark.parametrize(
    ("id", "first"),
    [
        ("A01", "scores"),
        ("A03a", "kv_a_layernorm"),
        ("A03b", "k_pe"),
        ("A06a", "kv_a_layernorm"),
        ("A06b", "kv_a_layernorm"),
        ("A07", "scores"),
        ("A17b", "q_a_layernorm"),
        ("A17c", "q_a_layernorm"),
    ],
)
def test_the_first_stage_that_is_off_is_the_one_that_is_wrong(id: str, first: str) -> None:
    assert differing("mla/query-latent", BY_ID[id].change)[0] == first


def test_without_a_query_latent_only_its_own_mistakes_show() -> None:
    assert differing("mla/no-query-latent", BY_ID["A17a"].change)[0] == "q_pe"
    assert differing("mla/no-query-latent", BY_ID["A17b"].change) == []
    assert differing("mla/no-query-latent", BY_ID["A17c"].change) == []
    assert differing("mla/query-latent", BY_ID["A17a"].change) == []


def test_the_statistic_over_all_columns_is_that_of_latent_and_key() -> None:
    right = outputs("mla/query-latent")
    down, normed = right[f"{PATH}.kv_a_proj_with_mqa"], right[f"{PATH}.kv_a_layernorm"]
    own = np.sqrt((down[:, :512] ** 2).mean(1, keepdims=True) + 1e-6)
    every = np.sqrt((down**2).mean(1, keepdims=True) + 1e-6)
    for id in ("A06a", "A06b"):
        changed = outputs("mla/query-latent", BY_ID[id].change)
        assert np.allclose(changed[f"{PATH}.kv_a_layernorm"], normed * own / every, rtol=1e-9)
        scale = 1.0 / every[:, None] if id == "A06a" else 1.0
        assert np.allclose(changed[f"{PATH}.k_pe"], right[f"{PATH}.k_pe"] * scale, rtol=1e-9)


def test_keys_of_all_heads_come_before_values_of_all_heads() -> None:
    right, changed = (outputs("mla/query-latent", m) for m in (lambda s: s, BY_ID["A07"].change))
    up = right[f"{PATH}.kv_b_proj"]  # (T, 2 (128 + 128))
    assert np.array_equal(changed[f"{PATH}.kv_b_proj"], up)  # the product is right, what is read of it is not
    value = up[:, 256:].reshape(-1, 2, 128)  # by head
    first = changed[f"{PATH}.heads"].reshape(-1, 2, 128)[0]  # a token that sees itself only
    assert np.allclose(first, value[0], rtol=1e-12)
