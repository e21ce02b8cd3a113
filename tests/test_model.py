"""The model: what does not change when inputs are packed, padded, split, reordered, traced or forced."""

from collections import Counter
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import V2, bits, config, model, random_ids, random_weights, relative_error, same_bits

import refimpl
from refimpl.layers import loss
from refimpl.losses import Divisors

EXACT_MODEL = model(precision="exact")
CFG = config()
IDS = random_ids(CFG, (4, 6), 7)
TARGETS = random_ids(CFG, (4, 6), 8)
TARGETS[1, 2:] = -100  # so that microbatches have unequal counts
COUNT = int((TARGETS != -100).sum())


def gradients_of(parts, deferred=False, one=EXACT_MODEL):
    """The gradients of several microbatches (number, rows of the batch), collected together."""
    grads = one.gradients(deferred)
    for number, rows in parts:
        result = one.forward(
            IDS[rows], targets=TARGETS[rows], divisors=Divisors((COUNT,)), microbatch=number, trace=()
        )
        assert one.backward(result, into=grads) is grads
    return grads.reduce()


WHOLE = gradients_of([(0, slice(None))])


class TestMicrobatches:
    @settings(max_examples=15)
    @given(st.permutations(range(4)), st.sets(st.integers(1, 3)), st.booleans())
    def test_no_split_and_no_order_changes_a_bit_in_exact(self, order, cuts, deferred: bool) -> None:
        edges = [0, *sorted(cuts), 4]
        parts = [list(order[a:b]) for a, b in pairwise(edges)]
        same_bits(gradients_of(list(enumerate(parts)), deferred), WHOLE)

    def test_one_backward_is_the_same_mapping(self) -> None:
        result = EXACT_MODEL.forward(IDS, targets=TARGETS)
        found = EXACT_MODEL.backward(result)
        assert {name: bits(g) for name, g in found.items() if name in WHOLE} == {
            name: bits(g) for name, g in WHOLE.items()
        }
        assert not any(found[name].any() for name in found if name not in WHOLE)

    def test_losses_of_microbatches_add_up_to_the_loss(self) -> None:
        whole = EXACT_MODEL.forward(IDS, targets=TARGETS, trace=()).loss
        parts = [
            EXACT_MODEL.forward(
                IDS[i : i + 1], targets=TARGETS[i : i + 1], divisors=Divisors((COUNT,)), trace=()
            ).loss
            for i in range(4)
        ]
        assert sum(parts) == pytest.approx(whole, rel=1e-15)

    def test_a_microbatch_without_targets_adds_nothing(self) -> None:
        rows = np.full((1, 6), -100)
        result = EXACT_MODEL.forward(IDS[:1], targets=rows, divisors=Divisors((5,)))
        assert result.loss == 0.0
        assert not any(g.any() for g in EXACT_MODEL.backward(result).values())

    def test_in_float64_the_order_of_microbatches_changes_no_bit_either(self) -> None:
        one, parts = model(), [(0, [0]), (1, [1, 3]), (2, [2])]
        expected = gradients_of(parts, one=one)
        for order in ([2, 0, 1], [1, 2, 0]):
            same_bits(gradients_of([parts[i] for i in order], one=one), expected)
            same_bits(gradients_of([parts[i] for i in order], deferred=True, one=one), expected)


DOCUMENTS = [random_ids(CFG, (n,), 20 + n) for n in (3, 5, 2)]
AIMS = [random_ids(CFG, (n,), 30 + n) for n in (3, 5, 2)]


class TestPacking:
    def alone(self, one):
        """Every document in a forward pass of its own: tensors and collected gradients."""
        grads, named = one.gradients(), []
        for number, (ids, aims) in enumerate(zip(DOCUMENTS, AIMS, strict=True)):
            result = one.forward(ids[None], targets=aims[None], divisors=Divisors((10,)), microbatch=number)
            one.backward(result, into=grads)
            named.append(result.tensors)
        return named, grads.reduce()

    def check(self, result, places):
        named, grads = self.alone(EXACT_MODEL)
        same_bits(EXACT_MODEL.backward(result, into=EXACT_MODEL.gradients()).reduce(), grads)
        tried = 0
        for name, tensor in result.tensors.items():
            if name.endswith(("self_attn.scores", "self_attn.probs", "loss.nll")):  # tokens are not first
                continue
            for (row, columns), document in zip(places, named, strict=True):
                assert bits(tensor[row, columns]) == bits(document[name][0]), name
                tried += 1
        assert tried > 60

    def test_packed_equals_separate_bit_for_bit(self) -> None:
        segments = np.repeat([[0, 1, 2]], [3, 5, 2], axis=1)
        ids, aims = (np.concatenate(x)[None] for x in (DOCUMENTS, AIMS))
        result = EXACT_MODEL.forward(ids, targets=aims, segment_ids=segments)
        self.check(result, [(0, slice(0, 3)), (0, slice(3, 8)), (0, slice(8, 10))])

    @pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
    @pytest.mark.parametrize("how", ["mask", "segment_ids"])
    def test_padded_equals_alone_bit_for_bit(self, left: bool, how: str) -> None:
        ids, aims, exists = (np.zeros((3, 6), int) + fill for fill in (11, 5, 0))
        places = []
        for row, document in enumerate(DOCUMENTS):
            columns = slice(6 - len(document), 6) if left else slice(0, len(document))
            ids[row, columns], aims[row, columns], exists[row, columns] = document, AIMS[row], 1
            places.append((row, columns))
        given_mask = {"mask": exists} if how == "mask" else {"segment_ids": exists - 1}
        self.check(EXACT_MODEL.forward(ids, targets=aims, **given_mask), places)

    def test_what_stands_in_padding_does_not_matter(self) -> None:
        mask = np.array([[0, 0, 1, 1, 1, 1]] * 4)
        other = np.where(mask == 1, IDS, 3)
        one, two = (EXACT_MODEL.forward(ids, labels=ids, mask=mask) for ids in (IDS, other))
        assert bits(one.logits[:, 2:]) == bits(two.logits[:, 2:])
        assert one.loss == two.loss
        same_bits(EXACT_MODEL.backward(one), EXACT_MODEL.backward(two))

    def test_padding_may_be_longer_than_the_position_table(self) -> None:
        ids, mask = np.zeros((1, 80), int), np.zeros((1, 80), int)
        ids[0, 70:76], mask[0, 70:76] = IDS[0], 1
        padded = EXACT_MODEL.forward(ids, mask=mask).logits
        assert bits(padded[:, 70:76]) == bits(EXACT_MODEL.forward(IDS[:1]).logits)

    def test_packed_documents_may_together_be_longer_than_the_position_table(self) -> None:
        ids, segments = np.tile(IDS[:1], (1, 12)), np.repeat([np.arange(12)], 6, axis=1)
        packed = EXACT_MODEL.forward(ids, segment_ids=segments).logits
        assert bits(packed[:, 66:]) == bits(EXACT_MODEL.forward(IDS[:1]).logits)

    def test_a_mask_of_ones_and_one_segment_change_no_bit(self) -> None:
        plain = EXACT_MODEL.forward(IDS).logits
        assert bits(EXACT_MODEL.forward(IDS, mask=np.ones((4, 6), bool)).logits) == bits(plain)
        assert bits(EXACT_MODEL.forward(IDS, segment_ids=np.full((4, 6), 9)).logits) == bits(plain)

    def test_later_tokens_do_not_matter(self) -> None:
        assert bits(EXACT_MODEL.forward(IDS[:, :4]).logits) == bits(EXACT_MODEL.forward(IDS).logits[:, :4])

    def test_positions_are_those_of_the_document_unless_given(self) -> None:
        plain = EXACT_MODEL.forward(IDS).logits
        counted = np.tile(np.arange(6), (4, 1))
        assert bits(EXACT_MODEL.forward(IDS, position_ids=counted).logits) == bits(plain)
        moved = EXACT_MODEL.forward(IDS, position_ids=counted + 20).logits
        assert bits(moved) != bits(plain)
        assert relative_error(moved, plain) < 1e-12  # only distances matter
        assert relative_error(EXACT_MODEL.forward(IDS, position_ids=counted * 2).logits, plain) > 1e-3


class TestTargets:
    def test_labels_are_targets_shifted_by_one(self) -> None:
        targets = np.full((4, 6), -100)
        targets[:, :-1] = IDS[:, 1:]
        one, two = EXACT_MODEL.forward(IDS, labels=IDS), EXACT_MODEL.forward(IDS, targets=targets)
        assert one.loss == two.loss
        same_bits(EXACT_MODEL.backward(one), EXACT_MODEL.backward(two))

    def test_labels_do_not_cross_from_one_document_to_the_next(self) -> None:
        segments = np.array([[0, 0, 0, 1, 1, -1]] * 4)
        targets = np.full((4, 6), -100)
        targets[:, [0, 1, 3]] = IDS[:, [1, 2, 4]]
        one = EXACT_MODEL.forward(IDS, labels=IDS, segment_ids=segments)
        two = EXACT_MODEL.forward(IDS, targets=targets, segment_ids=segments)
        assert one.loss == two.loss

    def test_labels_may_be_ignored_as_targets_may(self) -> None:
        labels, targets = IDS.copy(), np.full((4, 6), -100)
        labels[:, 3] = -100
        targets[:, :-1] = labels[:, 1:]
        one, two = EXACT_MODEL.forward(IDS, labels=labels), EXACT_MODEL.forward(IDS, targets=targets)
        assert one.loss == two.loss

    def test_padding_has_no_targets(self) -> None:
        mask = np.array([[1, 1, 1, 1, 0, 0]] * 4)
        one = EXACT_MODEL.forward(IDS, targets=TARGETS, mask=mask)
        two = EXACT_MODEL.forward(IDS[:, :4], targets=TARGETS[:, :4])
        assert one.loss == two.loss

    def test_the_loss_is_the_mean_over_the_targets(self) -> None:
        result = EXACT_MODEL.forward(IDS, targets=TARGETS)
        z = result.logits - result.logits.max(-1, keepdims=True)
        nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, TARGETS.clip(0)[..., None], -1)[..., 0]
        assert result.loss == pytest.approx(nll[TARGETS != -100].mean(), rel=1e-14)
        assert result.losses == {"main": result.loss}
        assert type(result.loss) is float

    def test_the_report_divides_by_all_positions(self) -> None:
        fields = {
            "n_group": 4,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        }  # where the profiles agree otherwise
        hf, report = (
            model(config(**fields), precision="exact", choices=name).forward(IDS, targets=TARGETS)
            for name in ("hf", "report")
        )
        assert bits(hf.logits) == bits(report.logits)
        assert report.loss == pytest.approx(hf.loss * COUNT / 24, rel=1e-15)

    def test_without_targets_there_is_no_loss(self) -> None:
        result = EXACT_MODEL.forward(IDS)
        assert result.loss is None
        assert result.losses == {}


class TestRouting:
    RESULT = EXACT_MODEL.forward(IDS, targets=TARGETS)
    OWN = RESULT.tensors["model.layers.1.mlp.gate.topk_idx"]

    def test_its_own_routing_changes_no_bit(self) -> None:
        forced = EXACT_MODEL.forward(IDS, targets=TARGETS, routing={1: self.OWN})
        same_bits(forced.tensors, self.RESULT.tensors)
        same_bits(EXACT_MODEL.backward(forced), EXACT_MODEL.backward(self.RESULT))

    def test_its_own_weights_change_no_forward_bit_and_are_constants(self) -> None:
        weight = self.RESULT.tensors["model.layers.1.mlp.gate.topk_weight"]
        forced = EXACT_MODEL.forward(IDS, targets=TARGETS, routing={1: (self.OWN, weight)})
        same_bits(forced.tensors, self.RESULT.tensors)
        found = EXACT_MODEL.backward(forced)
        assert not found["model.layers.1.mlp.gate.weight"].any()
        free = EXACT_MODEL.backward(self.RESULT)
        assert bits(found["model.norm.weight"]) == bits(free["model.norm.weight"])
        assert bits(found["model.embed_tokens.weight"]) != bits(free["model.embed_tokens.weight"])

    def test_the_order_of_given_experts_does_not_matter(self) -> None:
        flipped = EXACT_MODEL.forward(IDS, targets=TARGETS, routing={1: self.OWN[..., ::-1]})
        assert bits(flipped.logits) == bits(self.RESULT.logits)
        same_bits(EXACT_MODEL.backward(flipped), EXACT_MODEL.backward(self.RESULT))

    def test_other_experts_give_other_logits(self) -> None:
        other = np.tile([0, 1, 2], (4, 6, 1))
        forced = EXACT_MODEL.forward(IDS, routing={1: other})
        assert (forced.tensors["model.layers.1.mlp.gate.topk_idx"] == other).all()
        assert bits(forced.logits) != bits(self.RESULT.logits)

    def test_a_routing_of_nothing_is_free(self) -> None:
        assert bits(EXACT_MODEL.forward(IDS, routing={}).logits) == bits(self.RESULT.logits)


class TestTrace:
    def test_a_trace_changes_no_bit(self) -> None:
        one, two = (EXACT_MODEL.forward(IDS, labels=IDS, trace=trace) for trace in ("*", ()))
        assert two.tensors == {}
        assert bits(one.logits) == bits(two.logits)
        same_bits(EXACT_MODEL.backward(one), EXACT_MODEL.backward(two))

    def test_patterns_select_by_name(self) -> None:
        result = EXACT_MODEL.forward(IDS, trace=["model.layers.1.mlp.gate.*", "model.norm"])
        gate = "model.layers.1.mlp.gate."
        assert set(result.tensors) == {
            *(gate + leaf for leaf in ("logits", "scores", "topk_idx", "topk_weight")),
            "model.norm",
        }

    def test_one_pattern_may_be_a_text(self) -> None:
        assert list(EXACT_MODEL.forward(IDS, trace="model.norm").tensors) == ["model.norm"]

    def test_a_pattern_that_fits_nothing_gives_nothing(self) -> None:
        assert EXACT_MODEL.forward(IDS, trace="nothing.*").tensors == {}

    @pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}, V2])
    def test_every_module_s_output_has_its_path_and_tokens_first(self, fields) -> None:
        one = model(config(**fields))
        result = one.forward(IDS)
        modules = {name.rpartition(".")[0] for name in one.weights if not name.endswith("bias")}
        modules -= {"model.layers.1.mlp.gate"}  # its outputs are topk_idx and topk_weight
        modules = {m for m in modules if ".experts." not in m}
        modules |= {"model.layers.0", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.experts"}
        modules |= {"model.layers.0.self_attn", "model.layers.1.mlp.shared_experts"}
        assert modules <= set(result.tensors)
        for name in modules:
            assert result.tensors[name].shape[:2] == (4, 6)

    def test_logits_are_the_traced_logits(self) -> None:
        result = EXACT_MODEL.forward(IDS)
        assert result.logits.shape == (4, 6, 29)
        assert np.shares_memory(result.logits, result.tensors["logits"])  # views, not copies
        assert bits(result.tensors["lm_head"]) == bits(result.logits)

    def test_the_chosen_are_in_descending_order_of_selection(self) -> None:
        tensors = EXACT_MODEL.forward(IDS).tensors
        bias = EXACT_MODEL.weights["model.layers.1.mlp.gate.e_score_correction_bias"]
        gate = "model.layers.1.mlp.gate."
        choice = np.take_along_axis(tensors[gate + "scores"] + bias, tensors[gate + "topk_idx"], -1)
        assert (np.diff(choice) <= 0).all()


class TestCotangents:
    RESULT = EXACT_MODEL.forward(IDS, targets=TARGETS)

    def dlogits(self):
        run = self.RESULT._run
        return loss.backward(run.given.context, 1.0, run.losses[0]).reshape(4, 6, -1)

    def test_the_loss_s_own_cotangent_at_the_logits_stands_in_for_the_loss(self) -> None:
        found = EXACT_MODEL.backward(EXACT_MODEL.forward(IDS), {"logits": self.dlogits()})
        same_bits(found, EXACT_MODEL.backward(self.RESULT))

    def test_a_cotangent_joins_the_loss(self) -> None:
        found = EXACT_MODEL.backward(self.RESULT, {"logits": self.dlogits()})
        twice = {name: 2.0 * g for name, g in EXACT_MODEL.backward(self.RESULT).items()}
        same_bits(found, twice)

    def test_backward_is_linear_in_cotangents_bit_for_bit_for_powers_of_two(self) -> None:
        free, rng = EXACT_MODEL.forward(IDS), np.random.default_rng(0)
        given_at = {
            name: rng.standard_normal(free.tensors[name].shape)
            for name in ("model.layers.0", "model.layers.1.self_attn", "model.norm")
        }
        one = EXACT_MODEL.backward(free, given_at)
        four = EXACT_MODEL.backward(free, {name: 4.0 * g for name, g in given_at.items()})
        same_bits(four, {name: 4.0 * g for name, g in one.items()})

    def test_weights_above_the_cotangent_get_zero(self) -> None:
        free = EXACT_MODEL.forward(IDS)
        found = EXACT_MODEL.backward(free, {"model.layers.0": np.ones((4, 6, 12))})
        assert not found["lm_head.weight"].any()
        assert not any(g.any() for name, g in found.items() if name.startswith("model.layers.1."))
        assert found["model.layers.0.mlp.down_proj.weight"].any()

    def test_backward_may_be_asked_twice(self) -> None:
        same_bits(EXACT_MODEL.backward(self.RESULT), EXACT_MODEL.backward(self.RESULT))


class TestGradientsAsAMapping:
    RARE = config(n_routed_experts=64, n_group=1, topk_group=1, num_experts_per_tok=1)

    def test_every_parameter_has_one_of_its_shape_and_the_selection_bias_has_none(self) -> None:
        one = model(self.RARE)
        found = one.backward(one.forward(IDS[:1], labels=IDS[:1]))
        assert set(found) == {name for name in one.weights if not name.endswith("e_score_correction_bias")}
        assert len(found) == len(set(found))
        assert all(g.shape == one.weights[name].shape for name, g in found.items())
        assert "no.such.weight" not in found

    def test_experts_that_no_token_reached_have_exact_zeros(self) -> None:
        one = model(self.RARE)
        result = one.forward(IDS[:1], targets=TARGETS[:1])
        found = one.backward(result)
        reached = set(result.tensors["model.layers.1.mlp.gate.topk_idx"].reshape(-1).tolist())
        assert 0 < len(reached) < 7
        for expert in range(64):
            names = [name for name in found if f".mlp.experts.{expert}." in name]
            assert len(names) == 3
            assert all(found[name].any() == (expert in reached) for name in names)

    def test_a_sink_receives_every_name_once_with_the_same_bits(self) -> None:
        one = model(self.RARE, precision="exact")
        result = one.forward(IDS[:1], labels=IDS[:1])
        received, order = {}, []

        def sink(name, gradient):
            received[name] = gradient
            order.append(name)

        assert one.backward(result, into=sink) is sink
        assert set(Counter(order).values()) == {1}
        same_bits(received, dict(one.backward(result)))

    def test_a_tied_embedding_gets_both_gradients_under_one_name(self) -> None:
        tied, free = config(tie_word_embeddings=True), config()
        weights = random_weights(tied, 3)
        apart = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
        one = refimpl.load((tied, weights), "exact")
        two = refimpl.load((free, apart), "exact")
        results = [m.forward(IDS, labels=IDS) for m in (one, two)]
        assert bits(results[0].logits) == bits(results[1].logits)
        together, separate = (m.backward(r) for m, r in zip((one, two), results, strict=True))
        assert set(together) == set(separate) - {"lm_head.weight"}
        expected = separate["model.embed_tokens.weight"] + separate["lm_head.weight"]
        assert relative_error(together["model.embed_tokens.weight"], expected) < 4e-16

    def test_a_tied_embedding_s_gradient_does_not_depend_on_the_split_either(self) -> None:
        tied = config(tie_word_embeddings=True)
        one = refimpl.load((tied, random_weights(tied, 3)), "exact")
        same_bits(
            gradients_of([(1, [3, 0]), (0, [2, 1])], one=one), gradients_of([(0, [0, 1, 2, 3])], one=one)
        )


class TestPrecisions:
    def test_float32_stays_float32_everywhere(self) -> None:
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        for fields in ({}, V2, {"rope_scaling": yarn | {"mscale": 1.3, "mscale_all_dim": 0.7}}):
            one = model(config(**fields), precision="float32")
            result = one.forward(IDS, labels=IDS)
            found = {t.dtype for t in result.tensors.values()} | {
                g.dtype for g in one.backward(result).values()
            }
            assert found == {np.dtype(np.float32), np.dtype(np.int64)}

    @pytest.mark.parametrize(("precision", "unit"), [("float64", 2.0**-53), ("float32", 2.0**-24)])
    def test_they_agree_with_exact_to_their_unit_roundoff(self, precision: str, unit: float) -> None:
        """Up to 150 roundings are measured: small root mean squares amplify.  Three times that is allowed."""
        result = EXACT_MODEL.forward(IDS, targets=TARGETS)
        own = result.tensors["model.layers.1.mlp.gate.topk_idx"]
        one = model(precision=precision)
        other = one.forward(IDS, targets=TARGETS, routing={1: own})
        assert relative_error(other.logits, result.logits) <= 450 * unit
        expected = EXACT_MODEL.backward(result)
        for name, gradient in one.backward(other).items():
            assert relative_error(gradient, expected[name]) <= 450 * unit, name

    def test_a_batch_of_one_token_works(self) -> None:
        result = EXACT_MODEL.forward([[3]], targets=[[4]])
        assert result.logits.shape == (1, 1, 29)
        assert EXACT_MODEL.backward(result)["model.norm.weight"].any()

    def test_lists_and_small_integers_are_inputs_too(self) -> None:
        plain = EXACT_MODEL.forward(IDS).logits
        assert bits(EXACT_MODEL.forward(IDS.tolist()).logits) == bits(plain)
        assert bits(EXACT_MODEL.forward(IDS.astype(np.uint8)).logits) == bits(plain)

    @pytest.mark.parametrize("precision", ["float64", "float32"])
    def test_the_same_run_gives_the_same_bits_on_threads_too(self, precision: str) -> None:
        one = model(precision=precision)
        first = one.backward(one.forward(IDS, labels=IDS))
        for _ in range(3):
            same_bits(one.backward(one.forward(IDS, labels=IDS)), first)

    def test_neither_weights_nor_inputs_are_changed(self) -> None:
        weights, ids = random_weights(CFG, 1), IDS.copy()
        kept = {name: bits(w) for name, w in weights.items()}
        one = refimpl.load((CFG, weights), "exact")
        one.backward(one.forward(ids, labels=ids))
        assert {name: bits(w) for name, w in weights.items()} == kept
        assert (ids == IDS).all()


def test_weights_in_memory_may_be_bfloat16_arrays_and_have_to_be_numbers():
    cfg = config()
    given = dict(random_weights(cfg, 1))
    name = "model.norm.weight"
    given[name] = np.ones(cfg.hidden_size, ml_dtypes.bfloat16)
    assert refimpl.load((cfg, given)).weights[name].dtype == np.float32
    for bad in ("x", None, [[1.0], [2.0, 3.0]]):
        with pytest.raises(
            refimpl.Invalid, match=r"^tensor model\.norm\.weight .* must be an array of numbers\.$"
        ):
            refimpl.load((cfg, given | {name: bad}))


def test_a_source_that_is_nothing_lists_the_presets():
    with pytest.raises(refimpl.Unreadable, match=r"^source deepseek-v4 is neither .* deepseek-v3, .*\.$"):
        refimpl.load("deepseek-v4")
