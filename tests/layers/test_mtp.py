"""Modules of multi-token prediction."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    COMPLEX,
    EXACT,
    FLOAT64,
    STEP,
    TOLERANCE,
    bits,
    config,
    random_ids,
    random_weights,
    same_bits,
    worst_gradient_error,
)

import refimpl
from refimpl import TrainingConfig
from refimpl.checkpoint import names
from refimpl.config.choices import Choices
from refimpl.layers.batch import Inputs, positions
from refimpl.layers.mtp import shifted
from refimpl.programs import Setting, run

CFG = config(num_nextn_predict_layers=2)
PATH = "model.layers.2"
CHOICES = (
    {"mtp_concat": ("embedding_first", "hidden_first")},
    {"mtp_passes": ("after_norm", "before_norm")},
    {"mtp_first_embedding": ("keep", "zero")},
    {"mtp_positions": ("token", "hidden")},
    {"mtp_hidden": ("after_norm", "before_norm")},
    {"mtp_loss_divisor": ("targets", "positions")},
)
EVERY = [{name: value} for choice in CHOICES for name, values in choice.items() for value in values]
LAMBDA = 0.5
TRAINING = TrainingConfig(mtp_loss_weight=LAMBDA, balance_loss_weight=0.0)


def module(
    inputs: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    ar: Any = FLOAT64,
    backward: bool = False,
    choices: Choices | None = None,
    **arguments: int,
) -> dict[str, Any]:
    """The outputs of the first module, weights by checkpoint name."""
    setting = Setting(ar, CFG, choices or Choices(), PATH, backward, arguments, inputs, weights, {})
    return run("mtp", setting)


def own_weights(seed: int = 0) -> dict[str, np.ndarray]:
    every = random_weights(CFG, seed)
    return {n: w for n, w in every.items() if n.startswith(f"{PATH}.") or n in (names.EMBEDDING, names.HEAD)}


def some(seed: int = 0, shape: tuple[int, int] = (2, 5)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((*shape, CFG.hidden_size)),
        "input_ids": rng.integers(0, CFG.vocab_size, shape),
        "dy": rng.standard_normal((*shape, CFG.vocab_size)),
        "dnext": rng.standard_normal((*shape, CFG.hidden_size)),
    }


class TestByHand:
    def test_eh_proj_reads_the_normed_embedding_of_the_next_token_and_the_normed_state(self) -> None:
        weights, inputs = own_weights(), some()
        out = module(inputs, weights)

        def normed(x: np.ndarray, leaf: str) -> np.ndarray:
            scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.rms_norm_eps)
            return x * scale * weights[f"{PATH}.{leaf}.weight"]

        e = weights[names.EMBEDDING][inputs["input_ids"][:, 1:]].reshape(-1, CFG.hidden_size)
        h = inputs["x"][:, :-1].reshape(-1, CFG.hidden_size)
        joined = np.concatenate([normed(e, "enorm"), normed(h, "hnorm")], -1)
        expected = joined @ weights[f"{PATH}.eh_proj.weight"].T
        assert out[f"{PATH}.eh_proj"] == pytest.approx(expected)
        last = normed(out[PATH], "shared_head.norm")
        assert out[f"{PATH}.shared_head.head"] == pytest.approx(last @ weights[names.HEAD].T)
        assert out[f"{PATH}.following"] == pytest.approx(last)

    def test_hidden_first_swaps_the_two_halves(self) -> None:
        weights, inputs = own_weights(), some()
        wide = CFG.hidden_size
        name = f"{PATH}.eh_proj.weight"
        swapped = weights | {name: np.concatenate([weights[name][:, wide:], weights[name][:, :wide]], 1)}
        one = module(inputs, weights, EXACT)
        two = module(inputs, swapped, EXACT, choices=Choices(mtp_concat="hidden_first"))
        assert bits(one[f"{PATH}.eh_proj"]) == bits(two[f"{PATH}.eh_proj"])

    def test_the_first_embedding_of_every_document_is_zero_where_that_is_chosen(self) -> None:
        weights, inputs = own_weights(), some(shape=(1, 6))
        inputs["segment_ids"] = np.array([[0, 0, 0, 1, 1, 1]])
        kept = module(inputs, weights)[f"{PATH}.enorm"]
        zero = module(inputs, weights, choices=Choices(mtp_first_embedding="zero"))[f"{PATH}.enorm"]
        assert [bool(row.any()) for row in zero] == [False, True, False, True]
        assert (kept[[1, 3]] == zero[[1, 3]]).all()

    def test_before_norm_hands_on_the_output_of_the_block(self) -> None:
        out = module(some(), own_weights(), choices=Choices(mtp_passes="before_norm"))
        assert bits(out[f"{PATH}.following"]) == bits(out[PATH])


@pytest.mark.parametrize("choice", EVERY[:8], ids=str)
def test_gradients_are_derivatives_under_every_choice(choice: dict[str, str]) -> None:
    weights, inputs = own_weights(), some(3)
    names_of = [name for name in weights if not name.endswith("correction_bias")]
    choices = Choices(**choice)
    cotangents = np.concatenate([inputs["dy"][:, :-1], inputs["dnext"][:, :-1]], -1).reshape(8, -1)

    def forward(ar: Any, values: dict[str, np.ndarray]) -> np.ndarray:
        given = inputs | {"x": values["x"]}
        out = module(given, weights | {n: values[n] for n in names_of}, ar, choices=choices)
        return np.concatenate([out[f"{PATH}.shared_head.head"], out[f"{PATH}.following"]], -1)

    out = module(inputs, weights, backward=True, choices=choices)
    at = {"x": inputs["x"]} | {name: weights[name] for name in names_of}
    gradients = {n: out.get(f"grad.{n}", np.zeros(at[n].shape)) for n in at}
    assert worst_gradient_error(forward, at, gradients, cotangents, directions=1) < TOLERANCE


@pytest.mark.parametrize("choice", EVERY, ids=str)
def test_gradients_of_the_whole_loss_are_derivatives_under_every_choice(choice: dict[str, str]) -> None:
    """Two modules and packed documents; along one direction over all weights at once."""
    weights, choices = random_weights(CFG, 5), Choices(**choice)
    ids, segments = random_ids(CFG, (2, 7), 1), np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, -1, -1]])
    rng = np.random.default_rng(2)
    training = TrainingConfig(mtp_loss_weight=LAMBDA, balance_loss_weight=0.2)

    def loss(values: dict[str, np.ndarray], ar: Any) -> tuple[refimpl.Model, refimpl.Result]:
        model = refimpl.load((CFG, values), ar, choices, training)
        return model, model.forward(ids, labels=ids, segment_ids=segments, trace=())

    model, result = loss(weights, FLOAT64)
    gradients = model.backward(result)
    directions = {name: rng.standard_normal(w.shape) for name, w in weights.items() if name in gradients}
    terms = [float((gradients[name] * v).sum()) for name, v in directions.items()]
    stepped = {n: w + 1j * STEP * directions.get(n, 0.0) for n, w in weights.items()}
    derivative = complex(loss(stepped, COMPLEX)[1].loss or 0.0).imag / STEP
    assert abs(sum(terms) - derivative) <= TOLERANCE * sum(map(abs, terms))


class TestShift:
    def test_ids_positions_targets_and_segments_shift_together(self) -> None:
        ids, segments = np.array([[5, 6, 7, 8, 9]]), np.array([[0, 0, 0, 1, 1]])
        given = Inputs(ids, segments, positions(segments), np.array([[6, 7, -100, 9, -100]]))
        one = shifted(given, Choices())
        assert one.ids.tolist() == [[6, 7, 0, 9, 0]]
        assert one.segments.tolist() == [[0, 0, -1, 1, -1]]
        assert one.positions.tolist() == [[1, 2, 0, 1, 0]]
        assert one.targets is not None
        assert one.targets.tolist() == [[7, -100, -100, -100, -100]]
        assert shifted(one, Choices()).segments.tolist() == [[0, -1, -1, -1, -1]]

    @given(st.integers(0, 10**9))
    def test_every_existing_position_reads_the_token_so_many_places_later(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        size, length, depth = (int(rng.integers(1, 4)), int(rng.integers(1, 9)), int(rng.integers(1, 4)))
        ids = rng.integers(1, 9, (size, length))
        segments = np.sort(rng.integers(-1, 3, (size, length)), -1)
        given = Inputs(ids, segments, positions(segments), None)
        found = given
        for _ in range(depth):
            found = shifted(found, Choices())
        for b in range(size):
            for i in range(length):
                ahead = i + depth
                there = segments[b, i] >= 0 and ahead < length and segments[b, ahead] == segments[b, i]
                assert found.exists[b, i] == there
                if there:
                    assert (found.ids[b, i], found.positions[b, i]) == (
                        ids[b, ahead],
                        given.positions[b, ahead],
                    )


class TestModel:
    def loaded(self, precision: str = "exact", **choices: str) -> refimpl.Model:
        return refimpl.load((CFG, random_weights(CFG, 4)), precision, Choices(**choices), TRAINING)

    def test_the_second_module_reads_what_the_first_hands_on(self) -> None:
        ids = random_ids(CFG, (2, 6), 0)
        result = self.loaded().forward(ids)
        path = "model.layers.3"
        every = random_weights(CFG, 4)
        inputs = {"x": result.tensors["model.layers.2.shared_head.norm"], "input_ids": ids}
        alone = run("mtp", Setting(EXACT, CFG, Choices(), path, False, {"depth": 2}, inputs, every, {}))
        logits = result.tensors[f"{path}.shared_head.head"][:, :-2]
        assert bits(alone[f"{path}.shared_head.head"]) == bits(logits.reshape(-1, CFG.vocab_size))

    def test_a_packed_document_gives_the_bits_that_it_gives_alone(self) -> None:
        ids = random_ids(CFG, (1, 9), 1)
        segments = np.array([[0] * 4 + [1] * 5])
        model = self.loaded()
        packed = model.forward(ids, labels=ids, segment_ids=segments)
        for rows in (slice(0, 4), slice(4, 9)):
            alone = model.forward(ids[:, rows], labels=ids[:, rows])
            for layer, depth in ((2, 1), (3, 2)):
                name = f"model.layers.{layer}.shared_head.head"
                exist = slice(rows.start, rows.stop - depth)
                assert bits(packed.tensors[name][:, exist]) == bits(alone.tensors[name][:, :-depth])

    def test_padding_changes_no_bit(self) -> None:
        ids, model = random_ids(CFG, (1, 6), 2), self.loaded()
        wide = np.concatenate([ids, [[3, 3]]], 1)
        one = model.forward(ids, labels=ids)
        two = model.forward(wide, labels=wide, mask=np.array([[1] * 6 + [0] * 2]))
        assert bits(one.loss) == bits(two.loss)
        assert one.losses == two.losses
        same_bits(dict(model.backward(one)), dict(model.backward(two)))
        for layer, load in one.counts.items():
            assert (load == two.counts[layer]).all()

    def test_the_weight_of_a_module_is_lambda_over_their_number(self) -> None:
        ids = random_ids(CFG, (2, 6), 3)
        result = self.loaded("float64").forward(ids, labels=ids)
        means = []
        for layer, depth in ((2, 1), (3, 2)):
            z = result.tensors[f"model.layers.{layer}.shared_head.head"][:, : -depth - 1]
            p = np.exp(z - z.max(-1, keepdims=True))
            p = np.take_along_axis(p / p.sum(-1, keepdims=True), ids[:, depth + 1 :, None], -1)
            means.append(-np.log(p).mean())
        assert result.losses["mtp"] == pytest.approx(np.mean(means))
        assert result.loss == pytest.approx(result.losses["main"] + LAMBDA / 2 * sum(means))

    def test_a_module_without_targets_adds_nothing(self) -> None:
        ids = random_ids(CFG, (1, 3), 3)  # the second module has a position, but no target
        result = self.loaded().forward(ids, labels=ids)
        assert np.isfinite(result.loss or np.nan)
        assert not any(
            g.any() for n, g in self.loaded_gradients(ids).items() if n.startswith("model.layers.3.shared")
        )

    def loaded_gradients(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        model = self.loaded()
        return dict(model.backward(model.forward(ids, labels=ids)))

    def test_positions_are_relative_so_that_where_they_count_from_changes_only_rotated_parts(self) -> None:
        ids = random_ids(CFG, (1, 6), 4)
        one = self.loaded("float64").forward(ids, labels=ids)
        two = self.loaded("float64", mtp_positions="hidden").forward(ids, labels=ids)
        assert one.losses["mtp"] == pytest.approx(two.losses["mtp"], rel=1e-12)
        name = f"{PATH}.self_attn.q_pe"
        assert not np.allclose(one.tensors[name], two.tensors[name])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**9))
def test_any_split_into_microbatches_gives_the_same_bits_in_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = Choices(**{name: str(rng.choice(v)) for choice in CHOICES for name, v in choice.items()})
    cfg = config(num_nextn_predict_layers=int(rng.integers(1, 3)), topk_group=int(rng.integers(2, 5)))
    training = TrainingConfig(mtp_loss_weight=0.3, balance_loss_weight=0.1)
    model = refimpl.load((cfg, random_weights(cfg, seed % 1000)), "exact", choices, training)
    ids = rng.integers(0, cfg.vocab_size, (3, 5))
    whole = model.forward(ids, labels=ids)
    divisors = model.divisors(ids, labels=ids)
    grads = model.gradients()
    for number, row in enumerate(rng.permutation(3)):
        part = ids[row : row + 1]
        result = model.forward(part, labels=part, divisors=divisors, microbatch=number)
        model.backward(result, into=grads)
    touched = grads.reduce()
    every = model.backward(whole)
    same_bits({n: every[n] for n in touched}, touched)
    assert not any(every[n].any() for n in every if n not in touched)


def test_a_complex_step_goes_through_a_module() -> None:
    """So that the tests above try what they say."""
    inputs = some(1)
    out = module(inputs | {"x": inputs["x"] + 1e-30j}, own_weights(), COMPLEX)
    assert out[f"{PATH}.following"].imag.any()
