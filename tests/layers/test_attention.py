"""Causal softmax attention."""

import math

import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, bits, context, relative_error, worst_gradient_error

from refimpl.layers import attention, batch

CAUSAL = np.tri(4, dtype=bool)[None, None]
SCALE = 0.7


def draw(seed: int = 0, size: int = 2, heads: int = 3, length: int = 4, width: int = 5, value: int = 2):
    rng = np.random.default_rng(seed)
    shapes = {"query": width, "key": width, "value": value}
    return {name: rng.standard_normal((size, heads, length, w)) for name, w in shapes.items()}


def run(ar, at, allowed=CAUSAL, scale=SCALE):
    return attention.forward(context(ar=ar), at["query"], at["key"], at["value"], scale, allowed)


@pytest.mark.parametrize("ar", [FLOAT64, EXACT])
def test_the_formula_by_hand(ar) -> None:
    q, k = np.array([[[[1.0], [2.0]]]]), np.array([[[[math.log(2.0)], [math.log(4.0)]]]])
    v = np.array([[[[1.0, 0.0, 3.0], [0.0, 1.0, 8.0]]]])
    out, saved = run(ar, {"query": q, "key": k, "value": v}, np.tri(2, dtype=bool)[None, None], 1.0)
    # token 0 sees itself; token 1 weighs exp(2 ln 2) = 4 against exp(2 ln 4) = 16
    assert out[0, 0, 0].tolist() == [1, 0, 3]
    assert out[0, 0, 1] == pytest.approx([0.2, 0.8, 7.0], rel=1e-14)
    assert saved.probs.value()[0, 0, 0].tolist() == [1, 0]
    assert saved.scores[0, 0, 0, 1] == -np.inf


def test_probabilities_sum_to_one_and_masked_keys_have_exactly_none() -> None:
    _, saved = run(FLOAT64, draw())
    probs = saved.probs.value()
    assert np.abs(probs.sum(-1) - 1).max() < 1e-15
    assert not probs[np.broadcast_to(~CAUSAL, probs.shape)].any()


def test_what_is_masked_does_not_matter_bit_for_bit() -> None:
    at = draw()
    later = {k: v.copy() for k, v in at.items()}
    for name in ("key", "value"):
        later[name][:, :, 3] = 1e6 * later[name][:, :, 3] + 5
    a, b = run(EXACT, at)[0], run(EXACT, later)[0]
    assert bits(a[:, :, :3]) == bits(b[:, :, :3])
    assert bits(a[:, :, 3]) != bits(b[:, :, 3])


def test_a_permutation_of_keys_with_their_mask_changes_no_bit_in_exact() -> None:
    at, order = draw(), np.array([2, 0, 3, 1])
    moved = at | {name: at[name][:, :, order] for name in ("key", "value")}
    assert bits(run(EXACT, moved, CAUSAL[..., order])[0]) == bits(run(EXACT, at)[0])


def test_heads_and_sequences_are_independent_bit_for_bit_in_exact() -> None:
    at = draw()
    whole, _ = run(EXACT, at)
    alone, _ = run(EXACT, {name: x[1:2, 2:3] for name, x in at.items()})
    assert bits(alone) == bits(whole[1:2, 2:3])


def test_it_is_linear_in_the_values() -> None:
    at, other = draw(), draw(9)
    mixed = at | {"value": 2 * at["value"] - 3 * other["value"]}
    expected = 2 * run(FLOAT64, at)[0] - 3 * run(FLOAT64, at | {"value": other["value"]})[0]
    assert relative_error(run(FLOAT64, mixed)[0], expected) < 1e-14


def test_a_shift_of_all_scores_cancels() -> None:
    at = draw()
    shift = (
        np.zeros((1, 1, 1, 5)) + 3.0
    )  # the same vector added to every key adds <q, shift> to a row of scores
    moved = at | {"key": at["key"] + shift}
    assert relative_error(run(FLOAT64, moved)[0], run(FLOAT64, at)[0]) < 1e-13


@pytest.mark.parametrize("size", [1e3, 1e150])
def test_large_scores_do_not_overflow(size: float) -> None:
    at = draw()
    out, _ = run(EXACT, at | {"query": at["query"] * size, "key": at["key"] * size})
    assert np.isfinite(out).all()


def test_without_a_trace_the_scores_are_not_kept() -> None:
    at = draw()
    _, saved = attention.forward(context(probing=False), at["query"], at["key"], at["value"], SCALE, CAUSAL)
    assert saved.scores is None


@pytest.mark.parametrize("allowed", [CAUSAL, batch.allowed(np.array([[0, 0, 1, 1], [-1, 3, 3, -1]]))])
def test_gradients_are_those_of_the_complex_step(allowed) -> None:
    at, cotangent = draw(), np.random.default_rng(1).standard_normal((2, 3, 4, 2))
    found = attention.backward(context(), cotangent, run(FLOAT64, at, allowed)[1], SCALE)
    found = dict(zip(("query", "key", "value"), found, strict=True))

    def forward(ar, values):
        return run(ar, values, allowed)[0]

    assert worst_gradient_error(forward, at, found, cotangent) <= TOLERANCE


def test_a_cotangent_of_the_probabilities_joins() -> None:
    at = draw()
    rng = np.random.default_rng(1)
    cotangent, more = rng.standard_normal((2, 3, 4, 2)), rng.standard_normal((2, 3, 4, 4))
    c = context(cotangents={"m.probs": more})
    found = attention.backward(c, cotangent, run(FLOAT64, at)[1], SCALE)
    found = dict(zip(("query", "key", "value"), found, strict=True))

    def forward(ar, values):
        out, saved = run(ar, values)
        return np.concatenate([out.reshape(-1), saved.probs.value().reshape(-1)])

    both = np.concatenate([cotangent.reshape(-1), more.reshape(-1)])
    assert worst_gradient_error(forward, at, found, both) <= TOLERANCE
