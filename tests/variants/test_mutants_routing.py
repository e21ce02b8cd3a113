"""Mistakes of the gate, each against its wrong formula written out here in NumPy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refimpl import programs
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.validate.recomputed import FLOAT64
from refimpl.variants.mutants import MUTANTS

GOLDEN = Path(__file__).parent.parent.parent / "golden"
V3, NEGATIVE, TWELVE, TINY, V2 = (
    f"gate/{name}" for name in ("v3", "bias-negative", "bias-12", "tiny-scores", "v2-groups")
)


@cache
def folder(case: str) -> Folder:
    return Folder.open(GOLDEN / case)


def made(id: str, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """topk_idx, topk_weight, scores of the mutant."""
    s = setting_of(folder(case), FLOAT64)
    out = programs.run("gate", MUTANTS[id].change(s))
    return tuple(out[f"{s.path}.{name}"] for name in ("topk_idx", "topk_weight", "scores"))


def parts(case: str) -> tuple[np.ndarray, np.ndarray]:
    """logits (T, N), bias (N,), in NumPy's float64."""
    s = setting_of(folder(case), FLOAT64)
    bias = s.weights.get(f"{s.path}.e_score_correction_bias", np.zeros(1))
    return s.inputs["x"] @ s.weights[f"{s.path}.weight"].T, bias


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, -1, "stable")[:, :count]


def grouped(choice: np.ndarray, score, kept: int = 4, fill: float = -np.inf) -> np.ndarray:
    """The 8 best of the best groups of 8, by score(groups (T, 8, 32)) (T, 8)."""
    best = top(score(choice.reshape(len(choice), 8, -1)), kept)
    mask = np.zeros((len(choice), 8), bool)
    np.put_along_axis(mask, best, True, -1)
    return top(np.where(np.repeat(mask, choice.shape[1] // 8, -1), choice, fill), 8)


def two(groups: np.ndarray) -> np.ndarray:
    return np.sort(groups, -1)[..., -2:].sum(-1)


def largest(groups: np.ndarray) -> np.ndarray:
    return groups.max(-1)


def bf16(x: np.ndarray) -> np.ndarray:
    code = np.asarray(x, np.float32).view(np.uint32)
    code = code + np.uint32(0x7FFF) + (code >> np.uint32(16) & np.uint32(1))
    return (code & np.uint32(0xFFFF_0000)).view(np.float32).astype(np.float64)


def weights(scores: np.ndarray, idx: np.ndarray) -> np.ndarray:
    chosen = np.take_along_axis(scores, idx, -1)
    return 2.5 * chosen / chosen.sum(-1, keepdims=True)


def test_g01_weighs_by_the_biased_scores() -> None:
    logits, bias = parts(TWELVE)
    idx, weight, _ = made("G01", TWELVE)
    assert weight == pytest.approx(weights(sigmoid(logits) + bias, idx), rel=1e-12)


def test_g02_chooses_by_a_rounded_bias() -> None:
    logits, bias = parts(TWELVE)
    idx, _, _ = made("G02", TWELVE)
    assert np.array_equal(idx, grouped(sigmoid(logits) + bf16(bias), two))
    assert not np.array_equal(idx, grouped(sigmoid(logits) + bias, two))


def test_g03_rounds_logits() -> None:
    logits, _ = parts(V3)
    assert made("G03", V3)[2] == pytest.approx(sigmoid(bf16(logits)), rel=1e-12)


@pytest.mark.parametrize(
    ("id", "case", "selected"),
    [
        ("G04", NEGATIVE, lambda s, b: grouped(s + b, two, fill=0.0)),
        ("G05", V3, lambda s, b: grouped(s + b, largest)),
        ("G06", V3, lambda s, b: grouped(s, largest)),
        ("G07b", V3, lambda s, b: top(s + b, 8)),
        ("G18", V3, lambda s, b: _by_unbiased_groups(s, b)),
    ],
)
def test_a_wrong_selection_is_that_of_its_formula(id: str, case: str, selected) -> None:
    logits, bias = parts(case)
    idx, weight, _ = made(id, case)
    s = sigmoid(logits)
    assert np.array_equal(idx, selected(s, bias))
    assert not np.array_equal(idx, grouped(s + bias, two))
    assert weight == pytest.approx(weights(s, idx), rel=1e-12)


def _by_unbiased_groups(s: np.ndarray, b: np.ndarray) -> np.ndarray:
    best = top(two(s.reshape(len(s), 8, 32)), 4)
    mask = np.zeros((len(s), 8), bool)
    np.put_along_axis(mask, best, True, -1)
    return top(np.where(np.repeat(mask, 32, -1), s + b, -np.inf), 8)


def test_g07a_scores_by_a_softmax() -> None:
    logits, _ = parts(V3)
    idx, weight, scores = made("G07a", V3)
    assert scores == pytest.approx(softmax(logits), rel=1e-12)
    assert weight == pytest.approx(weights(softmax(logits), idx), rel=1e-12)


def test_g08_masks_before_the_softmax() -> None:
    logits, _ = parts(V2)
    idx, weight, scores = made("G08", V2)
    kept = scores > 0
    assert (kept.reshape(len(kept), 8, -1).all(-1).sum(-1) == 3).all()
    assert scores == pytest.approx(softmax(np.where(kept, logits, -np.inf)), rel=1e-12)
    assert weight == pytest.approx(16.0 * np.take_along_axis(scores, idx, -1), rel=1e-12)
    assert np.array_equal(idx, made("G12", V2)[0])  # which are the right ones


def test_g09_normalises_not_or_though_it_should_not() -> None:
    idx, weight, scores = made("G09a", V3)
    assert weight == pytest.approx(2.5 * np.take_along_axis(scores, idx, -1), rel=1e-12)
    assert made("G09b", V2)[1].sum(-1) == pytest.approx(16.0, rel=1e-12)


def test_g10_has_a_floor_or_a_larger_epsilon() -> None:
    idx, weight, scores = made("G10a", TINY)
    chosen = np.take_along_axis(scores, idx, -1)
    total = chosen.sum(-1, keepdims=True)
    assert weight == pytest.approx(2.5 * chosen / np.maximum(total, 6.1e-5), rel=1e-12)
    assert made("G10b", TINY)[1] == pytest.approx(2.5 * chosen / (total + 1e-6), rel=1e-12)


@pytest.mark.parametrize(("id", "case", "factor"), [("G11", V2, 1 / 16), ("G12", V3, 2.5), ("G13", V3, 0.4)])
def test_another_factor_scales_the_weights(id: str, case: str, factor: float) -> None:
    s = setting_of(folder(case), FLOAT64)
    right = programs.run("gate", s)[f"{s.path}.topk_weight"]
    assert made(id, case)[1] == pytest.approx(factor * right, rel=1e-12)


def test_g11_changes_nothing_where_weights_are_normalised() -> None:
    logits, bias = parts(V3)
    scores = sigmoid(logits)
    assert made("G11", V3)[1] == pytest.approx(weights(scores, grouped(scores + bias, two)), rel=1e-12)


def test_g16_prefers_the_higher_of_equal_ones() -> None:
    idx, _, scores = made("G16", "gate/ties")
    right = made("G12", "gate/ties")[0]
    rows = np.flatnonzero((np.sort(idx) != np.sort(right)).any(-1))
    assert rows.size
    for row in rows:
        ours, theirs = set(right[row]) - set(idx[row]), set(idx[row]) - set(right[row])
        assert sorted(scores[row, list(ours)]) == sorted(scores[row, list(theirs)])
        assert max(ours) < max(theirs)


def test_g17_rounds_the_weights() -> None:
    s = setting_of(folder(V3), FLOAT64)
    right = programs.run("gate", s)[f"{s.path}.topk_weight"]
    assert np.array_equal(made("G17", V3)[1], bf16(right))


def test_g19_has_the_bias_inside_of_the_sigmoid() -> None:
    logits, bias = parts(V3)
    idx, weight, scores = made("G19", V3)
    assert scores == pytest.approx(sigmoid(logits + bias), rel=1e-12)
    assert np.array_equal(idx, grouped(sigmoid(logits + bias), two))
    assert weight == pytest.approx(weights(sigmoid(logits + bias), idx), rel=1e-12)
