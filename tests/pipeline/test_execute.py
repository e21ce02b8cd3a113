"""A model through the schedules: loss and gradients are those of the unpipelined run, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import pairwise
from operator import add
from typing import Any
from weakref import ref

import numpy as np
import pytest
from support import V2, bits, config, model, one_sentence, random_ids, same_bits

import refimpl
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.losses import joined, parts, total
from refimpl.model import Model
from refimpl.pipeline import memory
from refimpl.pipeline.execute import Execution, execute, in_order, run
from refimpl.pipeline.network import Done
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Entry, Schedule
from refimpl.pipeline.simulate import Durations
from refimpl.pipeline.split import split
from refimpl.pipeline.stages import ModelStage, staged

# The weights of the losses are large, so that nothing hides behind the main one.
TRAINING = TrainingConfig(mtp_loss_weight=0.7, balance_loss_weight=0.4)
SHAPES = [  # schedule, ranks, microbatches, chunks
    ("gpipe", 2, 1, None),
    ("gpipe", 3, 3, None),
    ("gpipe", 4, 2, None),
    ("1f1b", 2, 3, None),
    ("1f1b", 3, 4, None),
    ("1f1b", 4, 5, None),
    ("interleaved", 2, 4, 2),
    ("interleaved", 2, 2, 3),
    ("interleaved", 3, 6, 2),
    ("zb1p", 2, 3, None),
    ("zb1p", 3, 5, None),
    ("zb1p", 4, 4, None),
    ("zbv", 2, 4, None),
    ("zbv", 3, 6, None),
    ("zbv", 2, 5, None),
    ("dualpipe", 2, 4, None),
    ("dualpipe", 4, 8, None),
    ("dualpipe", 2, 8, None),
    ("dualpipev", 1, 2, None),
    ("dualpipev", 2, 5, None),
    ("dualpipev", 3, 6, None),
]
IDS = [f"{name}-{ranks}-{many}" for name, ranks, many, _ in SHAPES]
ONE_OF_EACH = [SHAPES[i] for i in (2, 5, 6, 10, 12, 16, 19)]
ROWS, LENGTH = 9, 3
FEW_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}


@cache
def small(precision: str, layers: int = 4, modules: int = 1, **more: Any) -> Model:
    cfg = config(num_hidden_layers=layers, num_nextn_predict_layers=modules, **FEW_EXPERTS, **more)
    return model(cfg, precision=precision, training=TRAINING)


@cache
def batch() -> dict[str, np.ndarray]:
    """Rows of which two are padded and some targets do not count, so that microbatches are unlike."""
    cfg = config()
    ids, targets = random_ids(cfg, (ROWS, LENGTH), 5), random_ids(cfg, (ROWS, LENGTH), 6)
    mask = np.ones(ids.shape, int)
    mask[0, 2:] = mask[-1, :1] = 0
    targets[1, 1:] = -100
    return {"input_ids": ids, "targets": targets, "mask": mask}


def cut(whole: dict[str, np.ndarray], many: int) -> list[dict[str, np.ndarray]]:
    """Microbatches of unlike sizes: the first has what is left over."""
    size = ROWS // many
    edges = [0, *range(ROWS - size * (many - 1), ROWS + 1, size)]
    return [{n: x[a:b] for n, x in whole.items()} for a, b in pairwise(edges)]


def unpipelined(one: Model, batches: Any, ways: list[list[int]]) -> tuple[float, dict, dict]:
    """Loss, parts and gradients of microbatches one after the other; each way's are added up, then these."""
    counted = [
        one.divisors(**{n: x for n, x in b.items() if n not in ("routing", "position_ids")}) for b in batches
    ]
    whole = reduce(add, counted)
    collected = [one.gradients() for _ in ways]
    terms = []
    for number, given in enumerate(batches):
        result = one.forward(**given, trace=(), divisors=whole, microbatch=number)
        terms.append(result.terms)
        one.backward(result, into=next(g for g, way in zip(collected, ways, strict=True) if number in way))
    found = [grads.reduce() for grads in collected]
    gradients = found[0]
    for other in found[1:]:
        both = {n: one.ar.gradient(gradients[n] + other[n]) for n in gradients.keys() & other.keys()}
        gradients = gradients | other | both
    losses = parts(one.ar, joined(terms), whole)
    return total(losses, one.training), losses, gradients


def halves(schedule: Schedule) -> list[list[int]]:
    """DualPipe's directions: the first half of the microbatches and the second."""
    many = schedule.microbatches
    half = many // 2 if schedule.name == "dualpipe" else many
    return [way for way in (list(range(half)), list(range(half, many))) if way]


def agrees(found: Execution, expected: tuple[float, dict, dict], one: Model) -> None:
    loss, losses, gradients = expected
    assert found.loss == loss
    assert found.losses == losses
    same_bits({name: g for name, g in found.gradients.items() if name in gradients}, gradients)
    assert set(found.gradients) == {name for name in one.weights if one.weights.kind(name) == "param"}
    assert not any(g.any() for name, g in found.gradients.items() if name not in gradients)


@cache
def in_one(layers: int) -> tuple[float, dict, dict]:
    """The whole batch in one pass, exact."""
    one = small("exact", layers)
    result = one.forward(**batch(), trace=())
    grads = one.backward(result, into=one.gradients()).reduce()
    return result.loss, dict(result.losses), grads


class TestEquality:
    @pytest.mark.parametrize("shape", SHAPES, ids=IDS)
    def test_exact_is_the_whole_batch_in_one_run(self, shape: tuple) -> None:
        name, ranks, many, chunks = shape
        schedule = plan(name, ranks, many, chunks)
        one = small("exact", schedule.stages)
        found = execute(one, schedule, cut(batch(), many))
        agrees(found, in_one(schedule.stages), one)
        assert found.peak == memory.peak(schedule)

    @pytest.mark.parametrize("shape", SHAPES, ids=IDS)
    def test_float64_is_the_unpipelined_run_with_the_stated_association(self, shape: tuple) -> None:
        name, ranks, many, chunks = shape
        schedule = plan(name, ranks, many, chunks)
        one, batches = small("float64", schedule.stages, 2), cut(batch(), many)
        found = execute(one, schedule, batches, release="I")
        agrees(found, unpipelined(one, batches, halves(schedule)), one)
        assert found.peak == memory.peak(schedule, "I")

    @pytest.mark.parametrize(
        ("precision", "shape"),
        [("float32", shape) for shape in ONE_OF_EACH[::2]] + [("bf16", SHAPES[9]), ("v3-fp8", SHAPES[15])],
        ids=lambda value: value if isinstance(value, str) else value[0],
    )
    def test_and_so_are_the_others(self, shape: tuple, precision: str) -> None:
        name, ranks, many, chunks = shape
        schedule = plan(name, ranks, many, chunks)
        one, batches = small(precision, schedule.stages), cut(batch(), many)
        ways = [list(range(many))] if one.ar.order_free else halves(schedule)
        agrees(execute(one, schedule, batches), unpipelined(one, batches, ways), one)

    def test_dualpipe_is_not_the_sum_over_all_microbatches_in_their_order(self) -> None:
        """So the association has to be stated: with the other one, bits differ."""
        one, schedule, batches = small("float64"), plan("dualpipe", 4, 8), cut(batch(), 8)
        other = unpipelined(one, batches, [list(range(8))])[2]
        found = execute(one, schedule, batches).gradients
        assert any(bits(found[name]) != bits(g) for name, g in other.items())

    @pytest.mark.parametrize("shape", ONE_OF_EACH, ids=lambda shape: shape[0])
    def test_no_order_that_durations_give_changes_a_bit(self, shape: tuple) -> None:
        name, ranks, many, chunks = shape
        schedule = plan(name, ranks, many, chunks)
        one = small("float64", schedule.stages)
        batches, rng = cut(batch(), many), np.random.default_rng(ranks)
        expected = unpipelined(one, batches, halves(schedule))
        scale = [int(s) for s in rng.integers(0, 9, schedule.stages)]
        durations = Durations(*(int(d) for d in rng.integers(0, 9, 3)), latency=7, scale=scale)
        agrees(execute(one, schedule, batches, durations=durations), expected, one)


class TestShared:
    @pytest.mark.parametrize(("precision", "tied"), [("exact", True), ("float64", True), ("float64", False)])
    @pytest.mark.parametrize("shape", [("zb1p", 4, 5), ("dualpipe", 2, 6), ("dualpipev", 2, 4)], ids=str)
    def test_embedding_and_head_of_several_stages_add_up_once(
        self, shape: tuple, tied: bool, precision: str
    ) -> None:
        one, schedule = small(precision, layers=4, tie_word_embeddings=tied), plan(*shape)
        batches = cut(batch(), schedule.microbatches)
        ways = halves(schedule) if precision == "float64" else [list(range(schedule.microbatches))]
        found = execute(one, schedule, batches)
        agrees(found, unpipelined(one, batches, ways), one)
        embedding = "model.embed_tokens.weight"
        assert embedding in found.per_rank[0]  # of stage 0
        end = next(r for r, held in enumerate(schedule.placement) if schedule.stages - 1 in held)
        last = found.per_rank[end]
        assert embedding in last  # of the MTP modules
        assert ("lm_head.weight" in last) == (not tied)
        assert not any(name.endswith(("shared_head.head.weight", "0.embed_tokens.weight")) for name in last)

    @pytest.mark.parametrize(
        "stages",
        [
            (1, 2, 1, 0),  # the last stage is the head and the modules
            (0, 2, 1, 1),  # the first is the embedding
            (
                ["model.embed_tokens", "model.layers.0"],
                ["model.layers.1", "model.layers.2", "model.layers.3", "lm_head"],
                ["model.layers.4"],
                ["model.layers.5"],
            ),
        ],
        ids=["head alone", "embedding alone", "modules alone"],
    )
    @pytest.mark.parametrize("tied", [True, False])
    def test_any_cut(self, stages: Any, tied: bool) -> None:
        one, schedule = small("float64", 4, 2, tie_word_embeddings=tied), plan("zb1p", 4, 4)
        batches = cut(batch(), 4)
        agrees(
            execute(one, schedule, batches, stages=stages), unpipelined(one, batches, [list(range(4))]), one
        )

    def test_the_gradients_of_the_ranks_add_up_to_the_whole(self) -> None:
        one, schedule, batches = small("float64", layers=4), plan("dualpipe", 4, 8), cut(batch(), 8)
        found = execute(one, schedule, batches)
        seen: dict[str, list] = {}
        for own in found.per_rank:
            for name, g in own.items():
                seen.setdefault(name, []).append(g)
        assert {name for name, g in found.gradients.items() if g.any()} <= set(seen)
        assert {len(gs) for name, gs in seen.items() if name.endswith("q_a_proj.weight")} == {2}
        for name, gs in seen.items():
            assert sum(gs) == pytest.approx(found.gradients[name], rel=1e-12, abs=1e-14)


class TestInputs:
    def same(self, one: Model, batches: Any) -> None:
        schedule = plan("zbv", 2, len(batches))
        found = execute(one, schedule, batches)
        agrees(found, unpipelined(one, batches, [list(range(len(batches)))]), one)

    def test_packed_documents_labels_and_positions(self) -> None:
        one, ids = small("float64", layers=4), random_ids(config(), (4, 6), 1)
        segments = np.array([[0, 0, 0, 1, 1, -1]])
        self.same(one, [{"input_ids": i[None], "labels": i[None], "segment_ids": segments} for i in ids])
        places = np.arange(6)[None] * 3
        self.same(one, [{"input_ids": i[None], "labels": i[None], "position_ids": places} for i in ids])

    def test_forced_routing_of_each_microbatch(self) -> None:
        one, ids = small("float64", layers=4), random_ids(config(), (4, 1, 5), 1)
        rng = np.random.default_rng(0)
        routing = [
            {layer: rng.permuted(np.tile(np.arange(4), (1, 5, 1)), axis=-1)[..., :2] for layer in (1, 4)}
            for _ in ids
        ]
        self.same(
            one, [{"input_ids": i, "labels": i, "routing": r} for i, r in zip(ids, routing, strict=True)]
        )

    def test_microbatches_of_different_lengths_and_one_without_a_target(self) -> None:
        one = small("float64", layers=4)
        given = [random_ids(config(), (1 + n % 2, 3 + n), n) for n in range(4)]
        batches = [{"input_ids": ids, "labels": ids} for ids in given]
        batches[2]["labels"] = np.full_like(given[2], -100)
        self.same(one, batches)

    def test_a_v2_without_training(self) -> None:
        cfg = config(**V2, num_hidden_layers=4)
        one, ids = model(cfg), random_ids(cfg, (4, 1, 5), 1)
        self.same(one, [{"input_ids": i, "labels": i} for i in ids])

    def test_a_preset(self) -> None:
        one = refimpl.load("tiny-v3-mtp", "float32", training=TRAINING)
        ids = random_ids(one.config, (3, 1, 4), 1)
        batches = [{"input_ids": i, "labels": i} for i in ids]
        found = execute(one, plan("1f1b", 2, 3), batches)
        agrees(found, unpipelined(one, batches, [[0, 1, 2]]), one)


@dataclass(frozen=True)
class Watched:
    """A stage whose units' saved values are known, weakly."""

    stage: ModelStage
    number: int
    kept: dict[tuple[int, int], list[ref]]

    def forward(self, microbatch: int, x: np.ndarray | None) -> Done:
        done = self.stage.forward(microbatch, x)
        self.kept[self.number, microbatch] = [ref(one.saved) for one in done.saved.units]
        return done

    def backward(self, *given: Any) -> np.ndarray | None:
        return self.stage.backward(*given)


class TestWhatIsHeld:
    @pytest.mark.parametrize("release", ["W", "I"])
    def test_what_the_units_saved_is_there_until_its_release_and_not_after(self, release: str) -> None:
        one, schedule, kept = small("float64"), plan("zbv", 2, 5), {}
        net = staged(one, cut(batch(), 5), split(one.units, 4))
        net = replace(net, stages=tuple(Watched(stage, n, kept) for n, stage in enumerate(net.stages)))
        released = set()

        def watched() -> Iterator[tuple[int, Entry]]:
            for rank, entry in in_order(schedule):
                yield rank, entry
                released.update(a[1:] for a in entry.parts if a.kind in ("B", release))
                for key, of_units in kept.items():
                    assert {saved() is None for saved in of_units} == {key in released}

        run(net, schedule, release=release, order=watched())
        assert len(released) == 4 * 5

    def test_shares_of_microbatches_add_up_to_the_loss(self) -> None:
        found = execute(small("float64"), plan("1f1b", 2, 4), cut(batch(), 4), stages="more_last")
        assert sum(share.value for share in found.shares) == pytest.approx(found.loss, rel=1e-14)
        assert set(found.shares[0].parts) == {"main", "mtp", "balance"} == set(found.losses)

    def test_operands_wait_only_where_w_is_put_off(self) -> None:
        one, batches = small("float64", layers=4), cut(batch(), 8)
        plain = execute(one, plan("1f1b", 4, 8), batches, release="I")
        late = execute(one, plan("zb1p", 4, 8), batches, release="I")
        # A whole backward has one microbatch's operands waiting for a moment; on rank 3 of ZB1P three wait.
        assert late.peaks[3].operand_bytes > 2 * plain.peaks[3].operand_bytes > 0
        assert (
            late.peaks[3].activation_bytes
            < execute(one, plan("zb1p", 4, 8), batches).peaks[3].activation_bytes
        )

    def test_contributions_keyed_by_microbatch_cost_a_gradient_for_each(self) -> None:
        cfg = config(
            num_hidden_layers=4, first_k_dense_replace=4
        )  # dense: experts without tokens cost nothing
        one, ids = model(cfg), random_ids(cfg, (6, 1, 5), 1)
        found = execute(one, plan("1f1b", 4, 6), [{"input_ids": i, "labels": i} for i in ids])
        for peak, own in zip(found.peaks, found.per_rank, strict=True):
            assert peak.contribution_bytes == 6 * sum(g.nbytes for g in own.values())

    def test_only_hidden_states_are_sent(self) -> None:
        one, schedule = small("float32", layers=4), plan("1f1b", 4, 3)
        found = execute(one, schedule, cut(batch(), 3))
        each = ROWS * LENGTH * one.config.hidden_size * 4  # bytes of all microbatches over one cut
        assert found.sent == (each, 2 * each, 2 * each, each)


IDS_ = random_ids(config(), (3, 1, 4), 0)
GOOD = [{"input_ids": ids, "labels": ids} for ids in IDS_]


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"schedule": plan("1f1b", 5, 5)}, ("5 stages", "4 decoder layers")),
        ({"schedule": plan("1f1b", 4, 4)}, ("3 microbatches", "for 4")),
        ({"schedule": "1f1b"}, ("str", "Schedule")),
        ({"batches": []}, ("at least one microbatch",)),
        ({"batches": [GOOD[0], GOOD[1], 3]}, ("mapping",)),
        ({"batches": [*GOOD[:2], {"input_ids": IDS_[2]}]}, ("microbatch 2", "neither labels nor targets")),
        ({"batches": [*GOOD[:2], {"labels": IDS_[2]}]}, ("microbatch 2", "no input_ids")),
        ({"batches": [*GOOD[:2], GOOD[2] | {"trace": "*"}]}, ("microbatch 2", "'trace'", "input_ids")),
        ({"batches": [GOOD[0], {"input_ids": IDS_[1] + 99, "labels": IDS_[1]}, GOOD[2]]}, ("microbatch 1",)),
        ({"batches": [{"input_ids": i, "targets": i * 0 - 100} for i in IDS_]}, ("number of targets is 0",)),
        ({"release": "F"}, ("'F'", "'W'")),
        ({"stages": (1, 1, 1)}, ("1, 1, 1 decoder layers", "add up to 4")),
    ],
    ids=lambda value: None if isinstance(value, tuple) else "-".join(value),
)
def test_bad_input(changes: dict[str, Any], fragments: tuple[str, ...]) -> None:
    given = {"schedule": plan("1f1b", 3, 3), "batches": GOOD} | changes
    with pytest.raises(Invalid) as caught:
        execute(small("float64", layers=4), **given)
    one_sentence(caught, *fragments)
