"""The gate."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import EXACT, FLOAT64, TOLERANCE, V2, bits, config, context, worst_gradient_error

from refimpl.config.choices import Choices
from refimpl.layers import gate
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.gradients import Gradients

HF = Choices()
FLAT = {"n_group": 1, "topk_group": 1}


def at_logits(logits, bias=None, ar=FLOAT64, choices=HF, **fields):
    """The gate on x = logits with the identity as its weight."""
    logits = np.asarray(logits, float)
    experts = logits.shape[-1]
    cfg = config(hidden_size=experts, n_routed_experts=experts, **fields)
    weights = {"weight": np.eye(experts)}
    weights["e_score_correction_bias"] = np.zeros(experts) if bias is None else np.asarray(bias, float)
    c = context(weights, cfg=cfg, ar=ar, choices=choices)
    return c, *gate.forward(c, ar.array(logits))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def inverse(scores):
    """The logits that have these sigmoid scores."""
    scores = np.asarray(scores)
    return np.log(scores / (1 - scores))


class TestByHand:
    def test_two_tokens_of_three_experts_with_sigmoid(self) -> None:
        logits = inverse([[0.2, 0.5, 0.3], [0.6, 0.1, 0.2]])
        _, idx, weight, saved = at_logits(logits, num_experts_per_tok=2, **FLAT)
        assert saved.scores == pytest.approx(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.2]]))
        assert idx.tolist() == [[1, 2], [0, 2]]
        assert weight == pytest.approx(2.5 * np.array([[0.625, 0.375], [0.75, 0.25]]))

    def test_two_tokens_of_three_experts_with_softmax_are_scaled_and_not_normalised(self) -> None:
        scores = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
        _, idx, weight, saved = at_logits(
            np.log(scores) + 7.0, num_experts_per_tok=2, **V2, **FLAT, routed_scaling_factor=16.0
        )
        assert saved.scores == pytest.approx(scores)
        assert idx.tolist() == [[1, 2], [0, 2]]
        assert weight == pytest.approx(np.array([[8.0, 4.8], [9.6, 4.8]]))

    def test_groups_by_their_two_best_then_experts(self) -> None:
        # group scores 0.9 + 0.1, 0.6 + 0.5, 0.55 + 0.5: the largest single expert is in a dropped group
        scores = [[0.9, 0.1, 0.6, 0.5, 0.55, 0.52]]
        fields = {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
        _, idx, _, _ = at_logits(inverse(scores), **fields)
        assert idx.tolist() == [[2, 4, 5]]

    def test_groups_by_their_best_without_selection_bias(self) -> None:
        scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.55, 0.52]]) / 3.17
        fields = {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
        _, idx, _, _ = at_logits(np.log(scores), **V2, **fields)
        assert idx.tolist() == [[0, 2, 3]]


class TestSelection:
    def test_gate_weight_ignores_bias(self) -> None:
        logits = np.random.default_rng(0).standard_normal((5, 8))
        bias = np.linspace(0.0, 0.07, 8) ** 2
        _, idx, weight, saved = at_logits(logits, bias, **FLAT)
        chosen = np.take_along_axis(sigmoid(logits), idx, -1)
        assert weight == pytest.approx(2.5 * chosen / chosen.sum(-1, keepdims=True), rel=1e-14)
        assert saved.scores == pytest.approx(sigmoid(logits), rel=1e-14)

    def test_bias_moves_the_choice(self) -> None:
        _, idx, _, _ = at_logits(np.zeros((1, 8)), [0, 0, 0, 5, 0, 9, 0, 1], **FLAT)
        assert idx.tolist() == [[5, 3, 7]]

    def test_ties_go_to_the_lower_index(self) -> None:
        _, idx, _, _ = at_logits(np.zeros((2, 8)))
        assert idx.tolist() == [[0, 1, 2]] * 2

    def test_ties_of_groups_go_to_the_lower_group(self) -> None:
        _, idx, _, _ = at_logits([[0, 0, 1, 1, 1, 1, 1, 1]], topk_group=2)
        assert idx.tolist() == [[2, 3, 4]]

    def test_the_chosen_are_in_descending_order_of_the_biased_score(self) -> None:
        bias = np.array([0.0, 0.3, 0.0, 0.0])
        _, idx, weight, _ = at_logits(inverse([[0.4, 0.2, 0.3, 0.1]]), bias, num_experts_per_tok=3, **FLAT)
        assert idx.tolist() == [[1, 0, 2]]
        assert weight[0, 0] < weight[0, 1]  # not of the weight

    def test_a_dropped_group_is_minus_infinity_and_not_zero(self) -> None:
        """With negative biased scores an expert at 0.0 would win over the kept ones."""
        bias = np.full(8, -3.0)
        bias[:4] = -2.0
        _, idx, _, _ = at_logits(np.zeros((1, 8)), bias, topk_group=2, num_experts_per_tok=4)
        assert idx.tolist() == [[0, 1, 2, 3]]

    def test_all_experts_of_the_kept_groups_can_be_chosen(self) -> None:
        _, idx, _, _ = at_logits(np.arange(8.0)[None], topk_group=2, num_experts_per_tok=4)
        assert idx.tolist() == [[7, 6, 5, 4]]

    def test_greedy_looks_at_no_groups(self) -> None:
        v2 = V2 | {"topk_method": "greedy"}
        scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.55, 0.52]])
        _, idx, _, _ = at_logits(np.log(scores), **v2, n_group=None, topk_group=None)
        assert idx.tolist() == [[0, 2, 4]]

    def test_megatron_s_group_score_counts_as_many_as_are_chosen_per_group(self) -> None:
        """num_experts_per_tok // topk_group = 1 here: the best expert alone decides."""
        fields = {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
        scores = [[0.9, 0.1, 0.6, 0.5, 0.55, 0.54]]
        _, idx, _, _ = at_logits(inverse(scores), choices=Choices.named("megatron"), **fields)
        assert idx.tolist() == [[0, 2, 3]]

    @given(st.integers(0, 10**9))
    def test_it_is_what_its_definition_says(self, seed: int) -> None:
        """Plain Python sorting, with many ties, against the vectorised selection."""
        rng = np.random.default_rng(seed)
        groups, size = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        kept = int(rng.integers(1, groups + 1))
        chosen = int(rng.integers(1, kept * size + 1))
        cfg = config(
            n_routed_experts=groups * size, n_group=groups, topk_group=kept, num_experts_per_tok=chosen
        )
        choice = rng.integers(-3, 4, (4, groups * size)) / 4.0
        for row, found in zip(choice.tolist(), gate.select(choice, cfg, HF).tolist(), strict=True):
            parts = [row[g * size : (g + 1) * size] for g in range(groups)]
            scores = [sum(sorted(part)[-2:]) for part in parts]
            best = sorted(range(groups), key=lambda g: (-scores[g], g))[:kept]
            candidates = [e for e in range(len(row)) if e // size in best]
            assert found == sorted(candidates, key=lambda e: (-row[e], e))[:chosen]

    @given(st.integers(0, 10**9))
    def test_a_permutation_of_experts_permutes_the_choice_where_nothing_ties(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        choice, order = rng.standard_normal((3, 8)), rng.permutation(8)
        cfg = config(**FLAT)
        moved = gate.select(choice[:, order], cfg, HF)
        assert (order[moved] == gate.select(choice, cfg, HF)).all()


class TestWeights:
    def test_they_sum_to_the_scale_when_normalised(self) -> None:
        _, _, weight, _ = at_logits(np.random.default_rng(1).standard_normal((4, 8)))
        assert weight.sum(-1) == pytest.approx(np.full(4, 2.5), rel=1e-15)

    def test_they_are_scores_times_the_scale_when_not(self) -> None:
        _, idx, weight, saved = at_logits(
            np.random.default_rng(1).standard_normal((4, 8)), norm_topk_prob=False, ar=EXACT
        )
        assert bits(weight) == bits(np.take_along_axis(saved.scores, idx, -1) * 2.5)

    @pytest.mark.parametrize(
        ("epsilon", "weight"), [(1e-20, 2.5 / 3e-20 * 1e-20 / (1 + 1 / 3)), (0.0, 2.5 / 3)]
    )
    def test_the_epsilon_of_the_norm_is_a_choice(self, epsilon: float, weight: float) -> None:
        choices = HF.replace(topk_norm_epsilon=epsilon)
        _, _, found, _ = at_logits(np.full((1, 8), np.log(1e-20)), choices=choices)  # scores 1e-20
        assert found[0] == pytest.approx([weight] * 3)

    def test_the_epsilon_keeps_vanishing_scores_from_dividing_by_zero(self) -> None:
        _, _, weight, saved = at_logits(np.full((1, 8), -800.0))
        assert not saved.scores.any()
        assert weight.tolist() == [[0, 0, 0]]

    @pytest.mark.parametrize(
        ("profile", "single", "weight"), [("hf", 1, 2.5), ("megatron", 1, 1.25), ("megatron", 2, 2.5)]
    )
    def test_a_single_expert_is_normalised_or_left_as_is_chosen(
        self, profile: str, single: int, weight: float
    ) -> None:
        _, _, found, _ = at_logits(
            np.zeros((1, 8)), choices=Choices.named(profile), num_experts_per_tok=single, **FLAT
        )
        assert found.sum() == pytest.approx(weight)

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("normalise_unscaled", [0.625, 0.375]),
            ("ignore", [8.0, 4.8]),
            ("normalise_scaled", [10.0, 6.0]),
        ],
    )
    def test_v2_s_normalisation_is_a_choice(self, rule: str, expected: list[float]) -> None:
        fields = V2 | FLAT | {"norm_topk_prob": True, "routed_scaling_factor": 16.0, "num_experts_per_tok": 2}
        choices = HF.replace(v2_topk_norm=rule)
        _, _, weight, _ = at_logits(np.log([[0.2, 0.5, 0.3]]), choices=choices, **fields)
        assert weight[0] == pytest.approx(expected)

    def test_v2_s_single_expert_is_only_scaled(self) -> None:
        fields = V2 | FLAT | {"norm_topk_prob": True, "routed_scaling_factor": 16.0, "num_experts_per_tok": 1}
        _, _, weight, _ = at_logits(np.log([[0.2, 0.5, 0.3]]), **fields)
        assert weight.item() == pytest.approx(8.0)


CONFIGS = [
    {},
    {"norm_topk_prob": False},
    {"num_experts_per_tok": 1, "topk_group": 1},
    {"num_experts_per_tok": 4},
    V2,
    V2 | {"norm_topk_prob": True},
    V2 | {"topk_method": "greedy"},
    {"scoring_func": "softmax"},
    {"scoring_func": "softmax", "norm_topk_prob": False, **FLAT},
]


def drawn(fields, seed: int = 2, tokens: int = 6):
    rng = np.random.default_rng(seed)
    cfg = config(**fields)
    values = {"x": rng.standard_normal((tokens, 12)), "weight": rng.standard_normal((8, 12)) / 3}
    bias = {"e_score_correction_bias": 0.2 * rng.standard_normal(8)}
    return cfg, values, bias, rng.standard_normal((tokens, cfg.num_experts_per_tok))


class TestBackward:
    @pytest.mark.parametrize("fields", CONFIGS)
    @pytest.mark.parametrize("rule", ["normalise_unscaled", "normalise_scaled", "ignore"])
    def test_gradients_are_those_of_the_complex_step(self, fields, rule: str) -> None:
        cfg, values, bias, cotangent = drawn(fields)
        choices = HF.replace(v2_topk_norm=rule)
        c, grads = context(values | bias, cfg=cfg, choices=choices), Gradients(FLOAT64)
        dx = gate.backward(c, cotangent, gate.forward(c, values["x"])[2], grads)
        collected = grads.reduce()
        assert list(collected) == ["m.weight"]  # the bias gets none
        found = {"x": dx, "weight": collected["m.weight"]}

        def forward(ar, at):
            return gate.forward(context(at | bias, cfg=cfg, ar=ar, choices=choices), at["x"])[1]

        if cfg.num_experts_per_tok == 1 and cfg.norm_topk_prob and cfg.has_selection_bias:
            assert max(np.abs(g).max() for g in found.values()) < 1e-14  # a constant: only rounding is left
            return
        assert worst_gradient_error(forward, values, found, cotangent) <= TOLERANCE

    @pytest.mark.parametrize("fields", [{}, V2])
    def test_cotangents_of_logits_scores_and_weights_join(self, fields) -> None:
        cfg, values, bias, cotangent = drawn(fields)
        rng = np.random.default_rng(11)
        more = {leaf: rng.standard_normal((6, 8)) for leaf in ("logits", "scores")}
        more["topk_weight"] = rng.standard_normal((6, 3))
        c = context(values | bias, cfg=cfg, cotangents={f"m.{leaf}": g for leaf, g in more.items()})
        grads = Gradients(FLOAT64)
        dx = gate.backward(c, cotangent, gate.forward(c, values["x"])[2], grads)
        found = {"x": dx, "weight": grads.reduce()["m.weight"]}

        def forward(ar, at):
            _, weight, saved = gate.forward(context(at | bias, cfg=cfg, ar=ar), at["x"])
            return np.concatenate([weight, saved.logits, saved.scores], -1)

        both = np.concatenate([cotangent + more["topk_weight"], more["logits"], more["scores"]], -1)
        assert worst_gradient_error(forward, values, found, both) <= TOLERANCE

    def test_with_sigmoid_experts_that_no_token_chose_get_exactly_zero(self) -> None:
        cfg, values, bias, cotangent = drawn(FLAT | {"num_experts_per_tok": 2}, tokens=2)
        c, grads = context(values | bias, cfg=cfg), Gradients(FLOAT64)
        saved = gate.forward(c, values["x"])[2]
        gate.backward(c, cotangent, saved, grads)
        gradient = grads.reduce()["m.weight"]
        chosen = np.unique(saved.topk_idx)
        others = np.setdiff1d(np.arange(8), chosen)
        assert len(others) >= 4
        assert not gradient[others].any()
        assert gradient[chosen].any(-1).all()

    def test_normalised_weights_have_a_gradient_orthogonal_to_a_common_scale_of_scores(self) -> None:
        cfg, values, bias, cotangent = drawn({})
        c = context(values | bias, cfg=cfg)
        constant = np.ones_like(cotangent)  # the sum of the weights does not change
        dx = gate.backward(c, constant, gate.forward(c, values["x"])[2], Gradients(FLOAT64))
        assert np.abs(dx).max() < 1e-15


class TestForced:
    def run(self, routing, ar=EXACT, fields=None):
        cfg, values, bias, cotangent = drawn(fields or {})
        ops = gate.forced(DEEPSEEK_V3, routing)
        op, c = ops.gate, replace(context(values | bias, cfg=cfg, ar=ar), ops=ops)
        grads = Gradients(ar)
        idx, weight, saved = op.forward(c, values["x"])
        return idx, weight, op.backward(c, cotangent, saved, grads), grads.reduce()["m.weight"]

    def test_its_own_routing_changes_no_bit(self) -> None:
        free = self.run({})
        assert [bits(x) for x in self.run({"m": (free[0], None)})] == [bits(x) for x in free]

    def test_other_gates_are_free(self) -> None:
        other = np.zeros((6, 3), int) + [5, 6, 7]
        assert [bits(x) for x in self.run({"elsewhere": (other, None)})] == [bits(x) for x in self.run({})]

    def test_given_experts_get_their_own_scores(self) -> None:
        ids = np.zeros((6, 3), int) + [0, 4, 7]
        idx, weight, _, _ = self.run({"m": (ids, None)}, FLOAT64)
        cfg, values, _, _ = drawn({})
        scores = sigmoid(values["x"] @ values["weight"].T)[:, [0, 4, 7]]
        assert idx.tolist() == ids.tolist()
        assert weight == pytest.approx(cfg.routed_scaling_factor * scores / scores.sum(-1, keepdims=True))

    def test_given_experts_have_the_gradient_of_their_weights(self) -> None:
        ids = np.zeros((6, 3), int) + [0, 4, 7]
        cfg, values, bias, cotangent = drawn({})
        _, _, dx, dweight = self.run({"m": (ids, None)}, FLOAT64)
        ops = gate.forced(DEEPSEEK_V3, {"m": (ids, None)})

        def forward(ar, at):
            return ops.gate.forward(replace(context(at | bias, cfg=cfg, ar=ar), ops=ops), at["x"])[1]

        worst = worst_gradient_error(forward, values, {"x": dx, "weight": dweight}, cotangent)
        assert worst <= TOLERANCE

    def test_given_weights_are_constants(self) -> None:
        ids, weights = np.zeros((6, 3), int) + [0, 4, 7], np.random.default_rng(0).standard_normal((6, 3))
        _, weight, dx, dweight = self.run({"m": (ids, weights)})
        assert bits(weight) == bits(weights)
        assert not dx.any()
        assert not dweight.any()

    def test_with_given_weights_a_cotangent_of_the_scores_still_passes(self) -> None:
        ids, weights = np.zeros((6, 3), int) + [0, 4, 7], np.ones((6, 3))
        cfg, values, bias, cotangent = drawn({})
        ops, more = gate.forced(DEEPSEEK_V3, {"m": (ids, weights)}), np.ones((6, 8))
        op, c = ops.gate, replace(context(values | bias, cfg=cfg, cotangents={"m.scores": more}), ops=ops)
        assert op.backward(c, cotangent, op.forward(c, values["x"])[2], Gradients(FLOAT64)).any()


def test_scores_are_probabilities_with_softmax_whatever_the_size() -> None:
    _, _, _, saved = at_logits(np.array([[1e4, 0.0, -1e4, 3, 3, 3, 3, 3]]), **V2, ar=EXACT)
    assert saved.scores.tolist() == [[1.0, 0, 0, 0, 0, 0, 0, 0]]


def test_saved_is_frozen() -> None:
    _, _, _, saved = at_logits(np.zeros((1, 8)))
    assert replace(saved, weight_given=True).weight_given
    with pytest.raises(AttributeError):
        saved.weight_given = True
