"""Balance losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import COMPLEX, EXACT, FLOAT64, STEP, TOLERANCE, bits, config, context

from refimpl.config.choices import Choices
from refimpl.layers import balance
from refimpl.layers.balance import KINDS, Balancing

HALF = {"n_group": 2, "topk_group": 1}


def at(
    scores: np.ndarray,
    idx: Any,
    of: Any,
    weights: dict[str, float],
    ar: Any = FLOAT64,
    devices: int = 2,
    how: str = "selected",
    **fields: Any,
) -> tuple[Any, Any, Any]:
    """Context, losses and saved of scores (T, N) whose tokens are of the sequences `of`."""
    of = np.asarray(of)
    cfg = config(n_routed_experts=scores.shape[1], num_experts_per_tok=np.asarray(idx).shape[1], **fields)
    number = int(of.max(initial=-1)) + 1
    c = context(cfg=cfg, ar=ar, choices=Choices(balance_counts=how))
    c = replace(c, balancing=Balancing(of, number, weights, devices))
    return c, *balance.forward(c, ar.array(scores) if ar is not COMPLEX else scores, np.asarray(idx))


FLAT = {"n_group": 1, "topk_group": 1}


class TestByHand:
    def test_two_tokens_of_three_experts(self) -> None:
        scores = np.array([[0.9, 0.3, 0.3], [0.2, 0.8, 0.5]])
        c, losses, saved = at(scores, [[0], [1]], [0, 0], {"sequence": 1.0}, **FLAT)
        assert saved.factors["sequence"].tolist() == [[1.5, 1.5, 0.0]]
        assert losses["sequence"] == pytest.approx([1.1])
        assert balance.backward(c, saved)[0] == pytest.approx([0.1, 0.1, -0.4])

    def test_v2s_three_losses_of_two_devices(self) -> None:
        """Experts 0 and 1 are on the first device.  Both tokens are sent there, one of them to the second."""
        scores = np.array([[0.5, 0.3, 0.1, 0.1], [0.4, 0.1, 0.4, 0.1]])
        idx = [[0, 1], [0, 2]]
        fields = {"n_group": 2, "topk_group": 2}
        weights = dict.fromkeys(("expert", "device", "communication"), 1.0)
        _, losses, saved = at(scores, idx, [0, 0], weights, **fields)
        assert saved.factors["expert"].tolist() == [[2.0, 1.0, 1.0, 0.0]]
        assert saved.factors["device"].tolist() == [[1.5, 1.5, 0.5, 0.5]]
        assert saved.factors["communication"].tolist() == [[1.0, 1.0, 0.5, 0.5]]
        mean = [0.45, 0.2, 0.25, 0.1]
        for kind, factors in saved.factors.items():
            assert losses[kind] == pytest.approx([sum(f * p for f, p in zip(factors[0], mean, strict=True))])

    def test_even_counts_give_one_whatever_the_scores_are(self) -> None:
        scores = np.random.default_rng(0).random((4, 4))
        _, losses, _ = at(
            scores, [[0], [1], [2], [3]], [0] * 4, {"sequence": 1.0}, **HALF | {"topk_group": 2}
        )
        assert losses["sequence"] == pytest.approx([1.0], rel=1e-14)


class TestCounting:
    def test_plain_counts_look_at_no_bias_and_no_choice(self) -> None:
        scores = np.array([[0.9, 0.1, 0.5, 0.2], [0.1, 0.2, 0.3, 0.9]])
        _, _, saved = at(scores, [[1], [1]], [0, 0], {"sequence": 1.0}, how="plain", **HALF)
        assert saved.factors["sequence"].tolist() == [[2.0, 0.0, 0.0, 2.0]]

    def test_plain_counts_give_ties_to_the_lower_expert(self) -> None:
        _, _, saved = at(np.ones((1, 4)), [[3]], [0], {"sequence": 1.0}, how="plain", **HALF)
        assert saved.factors["sequence"].tolist() == [[4.0, 0.0, 0.0, 0.0]]

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_v2s_losses_always_count_the_chosen(self, kind: str) -> None:
        scores = np.array([[0.9, 0.1, 0.5, 0.2]])
        one, two = (at(scores, [[1]], [0], {kind: 1.0}, how=how, **HALF)[1] for how in ("plain", "selected"))
        assert bits(one[kind]) == bits(two[kind])

    def test_counts_are_of_each_sequence(self) -> None:
        idx = np.array([[0, 2], [2, 1], [0, 1]])
        assert balance.counts(idx, np.array([0, 0, 1]), 2, 4).tolist() == [[1, 1, 2, 0], [1, 1, 0, 0]]


class TestPadding:
    def test_padding_changes_no_bit_and_gets_no_gradient(self) -> None:
        rng = np.random.default_rng(3)
        scores, idx = rng.random((6, 4)), rng.integers(0, 4, (6, 1))
        real = np.array([0, 1, 2, 4])
        of = np.array([0, 0, 1, -1, 1, -1])
        weights = dict.fromkeys(KINDS, 0.5)
        c, losses, saved = at(scores, idx, of, weights, EXACT, **HALF)
        alone, same, kept = at(scores[real], idx[real], of[real], weights, EXACT, **HALF)
        for kind in KINDS:
            assert bits(losses[kind]) == bits(same[kind])
        dscores = balance.backward(c, saved)
        assert bits(dscores[real]) == bits(balance.backward(alone, kept))
        assert not dscores[[3, 5]].any()

    def test_a_sequence_without_tokens_has_loss_zero(self) -> None:
        c, losses, saved = at(np.ones((1, 4)), [[0]], [1], dict.fromkeys(KINDS, 1.0), **HALF)
        assert all(losses[kind][0] == 0.0 for kind in KINDS)
        assert np.isfinite(balance.backward(c, saved)).all()


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int], int]:
    """Scores, distinct chosen experts, sequences, fields and devices of a random gate."""
    rng = np.random.default_rng(seed)
    groups, width = int(rng.integers(1, 4)), int(rng.integers(2, 4))
    kept = int(rng.integers(1, groups + 1))
    chosen = int(rng.integers(1, kept * width + 1))
    tokens, sequences = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    scores = rng.random((tokens, groups * width)) + 0.05
    idx = np.argsort(rng.random(scores.shape), -1)[:, :chosen]
    return scores, idx, rng.integers(-1, sequences, tokens), {"n_group": groups, "topk_group": kept}, groups


@given(st.integers(0, 10**9), st.sampled_from(KINDS), st.sampled_from(["plain", "selected"]))
def test_gradients_are_derivatives(seed: int, kind: str, how: str) -> None:
    """Of the weighted sum over sequences, by the complex step; counts are constants."""
    scores, idx, of, fields, devices = drawn(seed)
    c, _, saved = at(scores, idx, of, {kind: 0.7}, devices=devices, how=how, **fields)
    direction = np.random.default_rng(seed).standard_normal(scores.shape)
    stepped = scores + 1j * STEP * direction
    _, losses, _ = at(stepped, idx, of, {kind: 0.7}, COMPLEX, devices, how, **fields)
    terms = balance.backward(c, saved) * direction
    size = float(np.abs(terms).sum() + np.abs(direction).sum())  # of even counts the terms cancel
    assert abs(0.7 * losses[kind].imag.sum() / STEP - terms.sum()) <= TOLERANCE * size * scores.size


@given(st.integers(0, 10**9))
def test_the_device_loss_is_the_report_s_sum_over_devices(seed: int) -> None:
    """f' the mean over a device's experts, P' the sum; and of the communication, tokens sent."""
    scores, idx, of, fields, devices = drawn(seed)
    weights = dict.fromkeys(("expert", "device", "communication"), 1.0)
    _, losses, _ = at(scores, idx, of, weights, devices=devices, **fields)
    experts, chosen = scores.shape[1], idx.shape[1]
    for b in range(len(losses["expert"])):
        rows = np.flatnonzero(of == b)
        if not len(rows):
            continue
        f = np.array([(idx[rows] == e).sum() for e in range(experts)]) * experts / (chosen * len(rows))
        p = scores[rows].mean(0)
        on = np.arange(experts) // (experts // devices)
        mean = np.array([f[on == d].mean() for d in range(devices)])
        total = np.array([p[on == d].sum() for d in range(devices)])
        sent = np.array([(on[idx[rows]] == d).any(-1).sum() for d in range(devices)])
        assert losses["expert"][b] == pytest.approx((f * p).sum())
        assert losses["device"][b] == pytest.approx((mean * total).sum())
        share = sent * devices / (fields["topk_group"] * len(rows))
        assert losses["communication"][b] == pytest.approx((share * total).sum())


@settings(max_examples=30)
@given(st.integers(0, 10**9), st.sampled_from(KINDS))
def test_any_split_of_the_sequences_gives_the_same_bits(seed: int, kind: str) -> None:
    """In `exact`; the weight of a sequence is the whole batch's."""
    scores, idx, of, fields, devices = drawn(seed)
    weights = {kind: 0.3}
    c, losses, saved = at(scores, idx, of, weights, EXACT, devices, "plain", **fields)
    dscores = balance.backward(c, saved)
    for b in range(len(losses[kind])):
        rows = np.flatnonzero(of == b)
        if len(rows):
            alone, own, kept = at(
                scores[rows], idx[rows], np.zeros(len(rows), int), weights, EXACT, devices, "plain", **fields
            )
            assert bits(own[kind][0]) == bits(losses[kind][b])
            assert bits(balance.backward(alone, kept)) == bits(dscores[rows])
