"""Mistakes of the softmax core: what they change, and their derivatives."""

import numpy as np
import pytest
from changed import GOLDEN, differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.cases.folder import Folder
from refimpl.numerics.formats import BF16, FP16, round_to
from refimpl.variants.mutants.attention import MUTANTS, PART

BY_ID = {mutant.id: mutant for mutant in MUTANTS}
PATH = "model.layers.3.self_attn"
ROUNDED = ("A12", "A16a", "A16b")


def given(case: str, name: str):
    folder = Folder.open(GOLDEN / case)
    return folder.given(folder.case.tensor(name))


@pytest.mark.parametrize("case", ["attention/packed-vjp", "mla/packed-vjp"])
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.id not in ROUNDED], ids=lambda m: m.id)
def test_the_backward_is_the_derivative_of_the_forward(mutant, case: str) -> None:
    assert gradient_error(case, mutant.change) < TOLERANCE


@pytest.mark.parametrize("id", ROUNDED)
def test_gradients_go_straight_through_roundings(id: str) -> None:
    case = "attention/causal-vjp"
    found, scale = outputs(case, BY_ID[id].change), outputs("rope/tables-yarn")[f"{PATH}.softmax_scale"][0]
    query, key, value, dy = (given(case, name) for name in ("query", "key", "value", "dy"))
    probs = found[f"{PATH}.probs"]
    dp = dy @ value.swapaxes(-1, -2)
    if id == "A16a":  # the wrong program's own rounding of the scores and the probabilities
        assert np.array_equal(probs, round_to(probs, BF16))
    ds = probs * (dp - (dp * probs).sum(-1, keepdims=True)) * scale
    assert np.allclose(found["grad.value"], probs.swapaxes(-1, -2) @ dy, atol=1e-12)
    assert np.allclose(found["grad.query"], ds @ key, atol=1e-12)
    assert np.allclose(found["grad.key"], ds.swapaxes(-1, -2) @ query, atol=1e-12)


def test_heads_of_values_are_read_as_if_they_were_as_wide_as_keys() -> None:
    value = given("attention/causal", "value")[0]  # (2, S, 128)
    flat = value.swapaxes(0, 1).reshape(-1)
    found = outputs("attention/causal", BY_ID["A02a"].change)[f"{PATH}.heads"][0]
    assert np.allclose(found[0, 0], value[0, 0], rtol=1e-12)  # the first head begins where it should
    assert np.allclose(found[1, 0], flat[192:320], rtol=1e-12)  # the second 192 elements after it


def test_heads_of_the_output_are_read_as_if_they_were_as_wide_as_keys() -> None:
    right, found = (
        outputs("attention/causal", m)[f"{PATH}.heads"][0] for m in (lambda s: s, BY_ID["A02b"].change)
    )
    flat = right.swapaxes(0, 1).reshape(-1)
    assert np.allclose(found[0], right[0], rtol=1e-12)
    assert np.allclose(found[1, 3], flat[3 * 256 + 192 : 3 * 256 + 320], rtol=1e-12)


def test_a_part_without_keys_counts_as_one_logit_of_zero() -> None:
    scores = outputs("attention/causal")[f"{PATH}.scores"]
    found = outputs("attention/causal", BY_ID["A09a"].change)[f"{PATH}.probs"]
    empty = (32 - 1 - np.arange(32)) // PART  # whole parts after the query
    expected = np.exp(scores) / (np.exp(scores).sum(-1, keepdims=True) + empty[:, None])
    assert np.allclose(found, expected, rtol=1e-11, atol=1e-15)


def test_padded_heads_are_read_as_if_they_were_not_padded() -> None:
    right, found = (
        outputs("attention/causal", m)[f"{PATH}.heads"][0] for m in (lambda s: s, BY_ID["A02c"].change)
    )
    padded = np.pad(right, ((0, 0), (0, 0), (0, 64))).swapaxes(0, 1).reshape(-1)
    assert np.array_equal(found.swapaxes(0, 1), padded[: right.size].reshape(32, 2, 128))


@pytest.mark.parametrize("id", ["A09b", "A09c", "A13b"])
def test_two_halves_are_right_where_both_are_seen_or_of_one_size(id: str) -> None:
    right, found = (
        outputs("attention/causal", m)[f"{PATH}.heads"][0] for m in (lambda s: s, BY_ID[id].change)
    )
    same = np.isclose(right, found, rtol=1e-12).all((0, 2))
    assert same.tolist() == ([True] * 16 + [False] * 16 if id == "A13b" else [False] * 16 + [True] * 16)


def test_a_half_that_is_not_seen_gives_the_mean_of_its_values() -> None:
    scores, value = outputs("attention/causal")[f"{PATH}.scores"][0], given("attention/causal", "value")[0]
    e = np.exp(scores[:, 3])
    expected = (np.einsum("hk,hkv->hv", e, value) + value[:, 16:].sum(1)) / (e.sum(-1) + 16)[:, None]
    found = outputs("attention/causal", BY_ID["A09c"].change)[f"{PATH}.heads"][0]
    assert np.allclose(found[:, 3], expected, atol=1e-12)


def test_the_later_half_is_read_with_the_stride_of_the_padded_one() -> None:
    value, right = given("attention/causal", "value")[0], outputs("attention/causal")
    found = outputs("attention/causal", BY_ID["A10"].change)[f"{PATH}.heads"][0]
    assert np.allclose(found[:, :16], right[f"{PATH}.heads"][0, :, :16], rtol=1e-12)  # they see one half only
    probs = right[f"{PATH}.probs"][0]
    early, late = probs[..., :16], probs[..., 16:]
    weight = late.sum(-1, keepdims=True)
    partial = np.where(weight > 0, late @ value[:, 16:] / np.where(weight > 0, weight, 1.0), 0.0)
    stored = partial.swapaxes(0, 1).reshape(-1)  # (S, H, 128), contiguous
    for token, head in ((20, 0), (17, 1)):
        begin = (token * 2 + head) * 192
        read = np.take(stored, np.arange(begin, begin + 128), mode="wrap")
        expected = early[head, token] @ value[head, :16] + weight[head, token] * read
        assert np.allclose(found[head, token], expected, atol=1e-12)


def test_only_the_last_token_but_one_sees_more_than_it_may() -> None:
    right, found = (
        outputs("attention/causal", m)[f"{PATH}.scores"] for m in (lambda s: s, BY_ID["A11"].change)
    )
    assert np.argwhere((right != found)[0, 0]).tolist() == [[30, 31]]
    assert differing("attention/causal", BY_ID["A11"].change) == ["scores", "probs", "heads"]


def test_products_become_infinite_beyond_float16() -> None:
    scale = outputs("rope/tables-yarn")[f"{PATH}.softmax_scale"][0]
    right, found = (
        outputs("attention/causal", m)[f"{PATH}.scores"] for m in (lambda s: s, BY_ID["A12"].change)
    )
    seen = np.isfinite(right)
    assert np.allclose(found[seen], round_to(right[seen] / scale, FP16) * scale, rtol=1e-12)


def test_parts_with_forgotten_maxima_are_right_when_there_is_one_part() -> None:
    right, found = (
        outputs("attention/sharp", m)[f"{PATH}.heads"] for m in (lambda s: s, BY_ID["A13a"].change)
    )
    assert np.allclose(right[:, :, :PART], found[:, :, :PART], rtol=1e-12)
    assert not np.isclose(right[:, :, PART:], found[:, :, PART:]).all(-1).any()


def test_a_sum_in_bfloat16_loses_small_terms() -> None:
    found = outputs("attention/causal", BY_ID["A16b"].change)[f"{PATH}.probs"]
    assert np.array_equal(found, round_to(found, BF16))
    assert np.abs(found.sum(-1) - 1.0).max() > 2.0**-8
