"""Mistakes of the latents' norms: what they change, and their derivatives."""

import numpy as np
import pytest
from changed import GOLDEN, differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.cases.folder import Folder
from refimpl.variants.mutants.norm import MUTANTS

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
KV = "model.layers.3.self_attn.kv_a_layernorm"


@pytest.mark.parametrize("case", ["norm/ranges-vjp", "mla/packed-vjp"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_the_backward_is_the_derivative_of_the_forward(mutant, case: str) -> None:
    assert gradient_error(case, mutant.change) < TOLERANCE


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.id != "A05c"], ids=lambda m: m.id)
def test_a_norm_that_is_not_of_a_latent_stays_as_it_is(mutant) -> None:
    assert differing("norm/hidden-vjp", mutant.change) == []


def test_another_epsilon_is_off_the_more_the_smaller_the_row() -> None:
    right, changed = outputs("norm/ranges")[KV], outputs("norm/ranges", BY_ID["A04a"].change)[KV]
    off = np.abs(changed - right).max(1) / np.abs(right).max(1)
    assert off[0] < 1e-5  # root mean square 0.8
    assert 1e-4 < off[4] < 1e-3  # 0.1
    assert off[8] > 0.02  # 0.01
    assert off[12] > 0.2  # 0.003
    assert differing("norm/ranges", BY_ID["A04b"].change) == []  # its epsilon is 1e-6
    assert differing("norm/epsilon", BY_ID["A04b"].change) == [KV]


def test_layernorm_subtracts_the_mean() -> None:
    folder = Folder.open(GOLDEN / "norm/ranges")
    x, gain = (folder.given(folder.case.tensor(name)) for name in ("x", f"{KV}.weight"))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gain
    assert np.allclose(outputs("norm/ranges", BY_ID["A05a"].change)[KV], expected, rtol=1e-12)


def test_halves_of_a_latent_have_their_own_size() -> None:
    name = f"{KV}"
    right, changed = (
        outputs("mla/query-latent")[name],
        outputs("mla/query-latent", BY_ID["A08a"].change)[name],
    )
    ratio = changed / right
    assert np.allclose(ratio[:, :256], ratio[:, :1], rtol=1e-9)
    assert np.allclose(ratio[:, 256:], ratio[:, -1:], rtol=1e-9)
    assert (np.abs(ratio[:, 0] - ratio[:, -1]) > 1e-3).all()
    assert np.allclose(1 / ratio[:, 0] ** 2 + 1 / ratio[:, -1] ** 2, 2.0, atol=1e-5)  # mean squares add up
    assert differing("norm/ranges-vjp", BY_ID["A08a"].change) == []  # a rank that has all of it is right


def test_a_reading_changes_the_norms_that_it_is_about() -> None:
    def norms(id: str) -> list[str]:
        own = [
            n
            for n in ("q_a_layernorm", "kv_a_layernorm")
            if n in differing("mla/query-latent", BY_ID[id].change)
        ]
        hidden = differing("norm/hidden", BY_ID[id].change)
        return own + ["input_layernorm"] * bool(hidden)

    assert norms("A05b") == norms("A08b") == ["kv_a_layernorm"]
    assert norms("A08c") == ["q_a_layernorm"]
    assert norms("A05a") == norms("A08a") == ["q_a_layernorm", "kv_a_layernorm"]
    assert norms("A05c") == ["q_a_layernorm", "kv_a_layernorm", "input_layernorm"]
