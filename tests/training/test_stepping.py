"""One training step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXACT, bits, config, one_sentence, random_ids, random_weights, same_bits

import refimpl
from refimpl import Invalid, TrainingConfig
from refimpl.config.choices import CHOICES, Choices
from refimpl.losses import Divisors, total
from refimpl.training import State, start, step, stepping
from refimpl.training.rules import DEEPSEEK_V3 as RULES

CFG = config(num_nextn_predict_layers=1)
TRAINING = TrainingConfig(
    warmup_steps=2, learning_rate=0.01, balance_loss_weight=0.1, bias_update_speed=0.25, ema_decay=0.5
)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def state(precision: Any = "exact", training: TrainingConfig = TRAINING, **more: Any) -> State:
    return start(CFG, random_weights(CFG, 0), training, precision=precision, **more)


def batch(seed: int = 0, shape: tuple[int, int] = (2, 6), **more: Any) -> dict[str, Any]:
    ids = random_ids(CFG, shape, seed)
    return {"input_ids": ids, "labels": ids, **more}


def same_state(a: State, b: State) -> None:
    for kind in ("weights", "first", "second", "average"):
        same_bits(getattr(a, kind), getattr(b, kind))
    assert (a.powers, a.steps, a.tokens) == (b.powers, b.steps, b.tokens)


class TestOrder:
    def test_the_loss_is_that_of_the_weights_before_the_step(self) -> None:
        before, one = state(), batch()
        _, report = step(before, [one])
        model = refimpl.load((CFG, random_weights(CFG, 0)), training=TRAINING)
        result = model.forward(**one)
        assert report.loss == result.loss
        assert report.losses == result.losses
        gradients = model.backward(result)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        assert report.gradient_norm == pytest.approx(norm, rel=1e-12)
        assert report.clip == pytest.approx(1.0 / (norm + 1e-6), rel=1e-12)

    def test_every_weight_moves_as_adamw_says(self) -> None:
        """From zero moments: the clipped gradient over its own size, and the decay."""
        before, one = state(), batch()
        after, report = step(before, [one])
        model = refimpl.load((CFG, random_weights(CFG, 0)), training=TRAINING)
        gradients = model.backward(model.forward(**one))
        assert report.learning_rate == 0.005
        for name, g in gradients.items():
            g = g * report.clip
            w = before.weights[name] * (1 - 0.0005) - 0.005 * g / (np.abs(g) + 1e-8)
            assert after.weights[name] == pytest.approx(w, rel=1e-9, abs=1e-12), name
            assert after.first[name] == pytest.approx(0.1 * g, rel=1e-9)
            assert after.second[name] == pytest.approx(0.05 * g * g, rel=1e-9)
            assert after.average[name] == pytest.approx((before.weights[name] + w) / 2, rel=1e-9)

    def test_the_bias_moves_by_the_routing_of_this_step(self) -> None:
        before = state()
        after, report = step(before, [batch()])
        for layer, load in report.loads.items():
            name = BIAS.replace(".1.", f".{layer}.")
            moved = np.sign(load.mean() - load) * 0.25
            assert (after.weights[name] == before.weights[name] + moved).all()
        assert set(report.loads) == {1, 2}  # the module's layer has a gate, too

    def test_the_bias_is_no_parameter(self) -> None:
        """No decay, no moments, no part in the norm, no average."""
        still = replace(TRAINING, bias_update_speed=0.0, weight_decay=0.5)
        before = state(training=still)
        after, _ = step(before, [batch()])
        assert bits(after.weights[BIAS]) == bits(before.weights[BIAS])
        assert BIAS not in before.first
        assert BIAS not in before.average

    def test_counters_count_steps_and_existing_tokens(self) -> None:
        one = batch(mask=np.array([[1] * 6, [1] * 4 + [0] * 2]))
        after, report = step(state(), [one, batch()])
        assert (after.steps, after.tokens, report.tokens) == (1, 22, 22)
        again, _ = step(after, [one])
        assert (again.steps, again.tokens) == (2, 32)
        assert again.powers.beta1 == 0.9 * 0.9

    def test_phases_begin_where_their_tokens_are_seen(self) -> None:
        training = replace(
            TRAINING,
            bias_update_speed_phases=((12, 0.0),),
            mtp_loss_weight=0.0,
            mtp_loss_weight_phases=((12, 1.0),),
        )
        first, one = step(state(training=training), [batch()])
        second, two = step(first, [batch(1)])
        assert (first.weights[BIAS] != state().weights[BIAS]).any()
        assert bits(second.weights[BIAS]) == bits(first.weights[BIAS])
        assert one.loss == total({**one.losses, "mtp": 0.0}, training.at(0))
        assert two.loss == two.losses["main"] + two.losses["mtp"] + 0.1 * two.losses["balance"]

    def test_an_expert_without_tokens_decays_and_keeps_its_place_in_the_order(self) -> None:
        idx = np.tile(np.arange(3), (2, 6, 1))
        before = state()
        after, _ = step(before, [batch(routing={1: idx, 2: idx})])
        for name in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.7.{name}.weight"
            assert after.weights[name] == pytest.approx(before.weights[name] * (1 - 0.0005), rel=1e-15)
            assert not after.first[name].any()

    def test_the_state_before_is_unchanged(self) -> None:
        before, twin = state(), state()
        step(before, [batch()])
        same_state(before, twin)


def cut(one: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {name: value[rows] for name, value in one.items()}


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**9))
def test_any_division_of_the_batch_gives_the_same_bits_in_exact(seed: int) -> None:
    """Of losses, norm, loads and the whole state after two steps, for drawn models, choices and masks."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 2, 4]))
    kept = int(rng.integers(1, groups + 1))
    v2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy"}
    cfg = config(
        num_nextn_predict_layers=int(rng.integers(0, 3)),
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=int(rng.integers(1, min(4, kept * 8 // groups) + 1)),
        tie_word_embeddings=bool(rng.integers(2)),
        **(v2 if rng.integers(2) else {}),
    )
    training = replace(
        TRAINING,
        balance_devices=int(rng.choice([1, 2, 4])),
        **{
            f"{kind}_balance_weight": float(rng.integers(2)) for kind in ("expert", "device", "communication")
        },
    )
    named = [c for c in CHOICES if c.name.startswith(("mtp_", "balance_", "loss_"))]
    choices = Choices(**{c.name: str(rng.choice(list(c.alternatives))) for c in named})
    size = int(rng.integers(2, 5))
    ids = rng.integers(0, cfg.vocab_size, (size, 5))
    segments = np.sort(rng.integers(0, 2, (size, 5)), -1)
    one = {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": np.where(rng.random((size, 5)) < 0.1, -1, segments),
    }
    order = rng.permutation(size)
    cuts = np.sort(rng.choice(np.arange(1, size), int(rng.integers(1, size)), replace=False))
    parts = [cut(one, rows) for rows in np.split(order, cuts)]
    whole = split = start(cfg, random_weights(cfg, seed % 997), training, choices)
    for _ in range(2):
        whole, a = step(whole, [one])
        split, b = step(split, parts)
        assert (a.loss, a.losses, a.gradient_norm, a.clip) == (b.loss, b.losses, b.gradient_norm, b.clip)
        assert {n: x.tolist() for n, x in a.loads.items()} == {n: x.tolist() for n, x in b.loads.items()}
    same_state(whole, split)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_updating_in_pieces_changes_no_bit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = step(state(precision), [batch()])
    monkeypatch.setattr(stepping, "PIECE", 17)
    pieces, _ = step(state(precision), [batch()])
    same_state(whole, pieces)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_divisions_agree_to_rounding_in_fast_arithmetics(precision: str) -> None:
    one = batch(shape=(4, 6))
    whole, a = step(state(precision), [one])
    _, b = step(state(precision), [cut(one, np.arange(3)), cut(one, np.arange(3, 4))])
    size = 1e-12 if precision == "float64" else 1e-4
    assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=size)
    assert all(w.dtype == precision for w in (*whole.weights.values(), *whole.first.values()))


@pytest.mark.parametrize("precision", ["exact", "float64", "float32", "bf16"])
def test_the_loss_falls(precision: str) -> None:
    now, one = state(precision, replace(TRAINING, ema_decay=0.0)), batch()
    losses = []
    for _ in range(6):
        now, report = step(now, [one])
        losses.append(report.losses["main"])
    assert losses[-1] < losses[0] - 0.1


class TestRules:
    def test_a_rule_can_be_replaced(self) -> None:
        frozen = replace(RULES, bias=lambda ar, bias, counts, speed: bias, rate=lambda *_: 0.0)
        before = state(rules=frozen)
        after, report = step(before, [batch()])
        same_bits(after.weights, before.weights)
        assert report.learning_rate == 0.0

    def test_means_of_means_are_another_step_when_microbatches_differ(self) -> None:
        """So the divisors are a rule that a mistake can replace."""

        def each(own: Sequence[Divisors]) -> list[Divisors]:
            return [replace(d, targets=tuple(len(own) * n for n in d.targets)) for d in own]

        wrong = replace(RULES, divisors=each)
        parts = [batch(0, (1, 6)), batch(1, (1, 4))]
        right, _ = step(state(), parts)
        other, _ = step(state(rules=wrong), parts)
        name = "lm_head.weight"
        assert not np.allclose(right.second[name], other.second[name], rtol=1e-6, atol=0)

    def test_an_arithmetic_of_one_s_own_can_be_given(self) -> None:
        same_state(step(state(EXACT), [batch()])[0], step(state("exact"), [batch()])[0])


class TestErrors:
    def test_a_batch_has_microbatches(self) -> None:
        for bad in ([], batch(), 3, [3]):
            with pytest.raises(Invalid) as caught:
                step(state("float64"), bad)  # type: ignore[arg-type]
            one_sentence(caught, "at least one microbatch")

    def test_a_batch_without_targets(self) -> None:
        one = {"input_ids": random_ids(CFG, (1, 4), 0)}
        with pytest.raises(Invalid) as caught:
            step(state("float64"), [one])
        one_sentence(caught, "the number of targets is 0")

    def test_a_loss_that_is_not_finite_names_the_step_and_the_first_tensor(self) -> None:
        before = state("float32")
        name = "model.layers.1.mlp.shared_experts.up_proj.weight"
        huge = {**before.weights, name: np.full_like(before.weights[name], 3e38)}
        with pytest.raises(Invalid) as caught:
            step(replace(before, weights=huge, steps=6), [batch()])
        one_sentence(caught, "step 7", "first", "model.layers.1.mlp.shared_experts.up_proj of microbatch 0")

    def test_weights_that_are_missing(self) -> None:
        weights = random_weights(CFG, 0)
        del weights["model.layers.2.enorm.weight"]
        with pytest.raises(Invalid) as caught:
            start(CFG, weights, TRAINING)
        one_sentence(caught, "model.layers.2.enorm.weight", "needs all")
