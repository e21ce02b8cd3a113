"""Any network runs through a schedule: a toy that is watched, and recorded runs of DualPipe's own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
from support import bits, one_sentence, relative_error, same_bits

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.floating import Floating
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline import memory
from refimpl.pipeline.buffers import buffers
from refimpl.pipeline.contributions import directions
from refimpl.pipeline.execute import in_order, run
from refimpl.pipeline.network import Done, Loss
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Entry, Pair, Schedule

RECORDED = sorted((Path(__file__).parent.parent / "recordings" / "pipeline" / "numeric").glob("*.npz"))
SCHEDULES = [
    ("gpipe", 3, 4),
    ("1f1b", 4, 6),
    ("interleaved", 2, 4),
    ("zb1p", 4, 6),
    ("zbv", 3, 6),
    ("dualpipe", 4, 10),
    ("dualpipev", 3, 7),
]
Key = tuple[int, int]


class Watched(Floating):
    """float64, which notes whose weight gradients it computes."""

    def __init__(self) -> None:
        super().__init__(np.float64)
        self.owner: dict[int, tuple[Key, Operand]] = {}  # identity of an operand dy -> whose it is
        self.done: list[Key] = []

    def wgrad(self, dy: Operand, x: Operand) -> np.ndarray:
        self.done.append(self.owner[id(dy)][0])
        return super().wgrad(dy, x)


@dataclass(frozen=True)
class Saved:
    x: Operand
    hidden: Operand
    slope: np.ndarray  # of tanh: no operand of a weight gradient
    error: np.ndarray | None  # of the last stage


@dataclass
class Toy:
    """Stage s is tanh(x W1_s^T) W2_s^T; the loss is the mean squared error, summed over microbatches."""

    w1: list[np.ndarray]
    w2: list[np.ndarray]
    x: np.ndarray  # (M, T, D)
    y: np.ndarray
    ar: Watched = field(default_factory=Watched)
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    saved: dict[Key, Any] = field(default_factory=dict)  # weakly
    slope: dict[Key, Any] = field(default_factory=dict)
    hidden: dict[Key, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[ToyStage]:
        return [ToyStage(self, number) for number in range(len(self.w1))]

    @property
    def microbatches(self) -> int:
        return len(self.x)

    @property
    def inputs(self) -> Any:
        return (self.x, self.y)

    def gradients(self, deferred: bool = False) -> Gradients:
        return Gradients(self.ar, deferred)

    def every(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return gradients

    def loss(self, terms: Any) -> Loss:
        total = sum(of_stages[-1] for of_stages in terms)
        return Loss(total, {"main": total})


@dataclass
class ToyStage:
    net: Toy
    number: int

    def forward(self, microbatch: int, x: np.ndarray | None) -> Done:
        net, key, last = self.net, (self.number, microbatch), self.number == len(self.net.w1) - 1
        net.calls.append(("F", *key))
        assert (x is None) == (self.number == 0)
        x = net.x[microbatch] if x is None else x
        hidden = np.tanh(x @ net.w1[self.number].T)
        y = hidden @ net.w2[self.number].T
        error = y - net.y[microbatch] if last else None
        saved = Saved(Operand(x), Operand(hidden), 1.0 - hidden**2, error)
        net.saved[key], net.slope[key], net.hidden[key] = ref(saved), ref(saved.slope), ref(hidden)
        return Done(y, saved, float((error**2).mean()) if last else None)

    def backward(
        self, microbatch: int, dy: np.ndarray | None, saved: Saved, grads: Gradients
    ) -> np.ndarray | None:
        net, key = self.net, (self.number, microbatch)
        net.calls.append(("I", *key))
        assert (dy is None) == (saved.error is not None)
        dy = 2.0 * saved.error / saved.error.size if dy is None else dy
        dpre = dy @ net.w2[self.number] * saved.slope
        for leaf, d, x in (("W1", dpre, saved.x), ("W2", dy, saved.hidden)):
            given = Operand(d)
            net.ar.owner[id(given)] = (key, given)  # held, so that no other one has its identity
            grads.weight(f"{leaf}_{self.number}", microbatch, given, x)
        return dpre @ net.w1[self.number] if self.number else None


def toy(stages: int, microbatches: int, seed: int = 0) -> Toy:
    rng = np.random.default_rng(seed)
    w1 = [rng.standard_normal((5, 4)) / 2 for _ in range(stages)]
    w2 = [rng.standard_normal((4, 5)) / 2 for _ in range(stages)]
    x, y = rng.standard_normal((2, microbatches, 3, 4))
    return Toy(w1, w2, x, y)


def unpipelined(net: Toy, ways: list[list[int]]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of the microbatches, and gradients: each way added up in its order, then the ways."""
    losses, of_ways = {}, []
    for way in ways:
        total: dict[str, np.ndarray] = {}
        for m in way:
            x, kept = None, []
            for stage in net.stages:
                x, saved, losses[m] = stage.forward(m, x)
                kept.append(saved)
            dy = None
            for stage, saved in zip(reversed(net.stages), reversed(kept), strict=True):
                own = net.gradients()
                dy = stage.backward(m, dy, saved, own)
                for name, g in own.reduce().items():
                    total[name] = total[name] + g if name in total else g
        of_ways.append(total)
    whole = of_ways[0]
    for other in of_ways[1:]:
        whole = {name: whole[name] + other[name] for name in whole}
    return [losses[m] for m in sorted(losses)], whole


def ways_of(name: str, microbatches: int) -> list[list[int]]:
    """DualPipe's directions are the two halves of the microbatches."""
    half = microbatches // 2 if name == "dualpipe" else microbatches
    return [part for part in (list(range(half)), list(range(half, microbatches))) if part]


def any_order(schedule: Schedule, seed: int) -> Iterator[tuple[int, Entry]]:
    """A random one of the orders in which each entry comes after what it needs."""
    rng, position = np.random.default_rng(seed), [0] * schedule.size
    done: set[tuple[str, int, int]] = set()

    def ready(entry: Entry) -> bool:
        for kind, stage, microbatch in entry.parts:
            if kind == "F" and stage and ("F", stage - 1, microbatch) not in done:
                return False
            if (
                kind in "BI"
                and stage < schedule.stages - 1
                and not {("B", stage + 1, microbatch), ("I", stage + 1, microbatch)} & done
            ):
                return False
        return True

    while True:
        heads = [(r, own[position[r]]) for r, own in enumerate(schedule.ranks) if position[r] < len(own)]
        if not heads:
            return
        heads = [head for head in heads if ready(head[1])]
        rank, entry = heads[int(rng.integers(len(heads)))]
        yield rank, entry
        position[rank] += 1
        done |= {tuple(action) for action in entry.parts}


class TestRecorded:
    @pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
    def test_losses_and_gradients_of_every_rank_are_those_of_the_official_code(self, path: Path) -> None:
        with np.load(path) as recorded:
            given = {name: recorded[name] for name in recorded.files}
        stages, ranks, many = (int(given[name]) for name in "SPM")
        x, y = (given[name].reshape(many, -1, given[name].shape[-1]) for name in "XY")
        net = Toy([given[f"W1_{s}"] for s in range(stages)], [given[f"W2_{s}"] for s in range(stages)], x, y)
        name = path.stem.partition("_")[0]
        found = run(net, plan(name, ranks, many))
        assert relative_error([share.value for share in found.shares], given["loss"]) <= 1e-13
        tried = 0
        for key in given:
            if key.startswith("grad_"):
                _, rank, slot, leaf = key.split("_")
                stage = given[f"stage_{rank}_{slot}"]
                own = found.per_rank[int(rank[1:])][f"{leaf}_{stage}"]
                assert relative_error(own, given[key]) <= 1e-13, key
                tried += 1
            elif key.startswith("seqgrad_"):
                assert relative_error(found.gradients[key.removeprefix("seqgrad_")], given[key]) <= 1e-13
        assert tried == 4 * ranks
        assert [set(own) for own in found.per_rank] == [
            {f"{leaf}_{given[f'stage_r{r}_slot{slot}']}" for leaf in ("W1", "W2") for slot in (0, 1)}
            for r in range(ranks)
        ]

    def test_they_are_there(self) -> None:
        assert len(RECORDED) == 5


@pytest.mark.parametrize(("name", "ranks", "many"), SCHEDULES)
class TestRules:
    def test_loss_and_gradients_are_the_unpipelined_ones_in_every_order(
        self, name: str, ranks: int, many: int
    ) -> None:
        schedule = plan(name, ranks, many)
        net = toy(schedule.stages, many)
        losses, expected = unpipelined(net, ways_of(name, many))
        for order in (None, any_order(schedule, 1), any_order(schedule, 2)):
            found = run(net, schedule, order=order)
            assert [share.value for share in found.shares] == losses
            same_bits(found.gradients, expected)

    def test_a_rank_computes_the_stages_that_it_holds_in_its_order(
        self, name: str, ranks: int, many: int
    ) -> None:
        schedule = plan(name, ranks, many)
        net = toy(schedule.stages, many)
        of_rank: list[list[tuple[str, int, int]]] = [[] for _ in range(ranks)]

        def watched() -> Iterator[tuple[int, Entry]]:
            for rank, entry in any_order(schedule, 3):
                before = len(net.calls)
                yield rank, entry
                of_rank[rank] += net.calls[before:]

        run(net, schedule, order=watched())
        for rank, own in enumerate(of_rank):
            assert {stage for _, stage, _ in own} == set(schedule.placement[rank])
            wanted = [a for entry in schedule.ranks[rank] for a in entry.parts if a.kind != "W"]
            assert own == [("F" if a.kind == "F" else "I", a.stage, a.microbatch) for a in wanted]

    def test_w_computes_its_own_weight_gradients_and_nothing_else_computes_any(
        self, name: str, ranks: int, many: int
    ) -> None:
        schedule = plan(name, ranks, many)
        net = toy(schedule.stages, many)

        def watched() -> Iterator[tuple[int, Entry]]:
            for rank, entry in in_order(schedule):
                before = len(net.ar.done)
                yield rank, entry
                wanted = [(a.stage, a.microbatch) for a in entry.parts if a.kind in "BW"]
                assert net.ar.done[before:] == [key for key in wanted for _ in ("W1", "W2")]

        run(net, schedule, order=watched())

    @pytest.mark.parametrize("release", ["W", "I"])
    def test_activations_are_freed_when_the_rule_says_and_operands_at_w(
        self, name: str, ranks: int, many: int, release: str
    ) -> None:
        schedule = plan(name, ranks, many)
        net = toy(schedule.stages, many)
        dropped: set[Key] = set()
        finished: set[Key] = set()
        waited = 0

        def watched() -> Iterator[tuple[int, Entry]]:
            nonlocal waited
            for rank, entry in in_order(schedule):
                yield rank, entry
                for kind, *rest in entry.parts:
                    key = (rest[0], rest[1])
                    if kind == "B" or kind == release:
                        dropped.add(key)
                    if kind in "BW":
                        finished.add(key)
                for kept in (net.saved, net.slope):
                    assert {key for key, one in kept.items() if one() is None} == dropped
                assert {key for key, one in net.hidden.items() if one() is None} == finished
                waited += len(dropped - finished)

        found = run(net, schedule, release=release, order=watched())
        assert len(finished) == schedule.stages * many
        deferred = any(action.kind == "W" for _, _, action in schedule.actions())
        assert (waited > 0) == (deferred and release == "I")
        assert found.peak == memory.peak(schedule, release)
        size = buffers(Saved(Operand(np.ones((3, 4))), Operand(np.ones((3, 5))), np.ones((3, 5)), None))
        own = sum(size.values()) * max(found.peak)
        assert max(peak.activation_bytes for peak in found.peaks) <= own + 8 * 3 * 4 * many

    def test_what_is_sent_is_counted(self, name: str, ranks: int, many: int) -> None:
        schedule = plan(name, ranks, many)
        found = run(toy(schedule.stages, many), schedule)
        where = {
            (action.stage, action.microbatch): rank
            for rank, _, action in schedule.actions()
            if action.kind == "F"
        }
        hops = sum(where[s, m] != where[s + 1, m] for s in range(schedule.stages - 1) for m in range(many))
        assert sum(found.sent) == 2 * hops * 8 * 3 * 4  # each hidden state there, each gradient back


def test_the_measured_peak_is_what_is_in_memory_not_what_is_booked() -> None:
    """Whoever keeps what a stage saved is seen."""
    schedule, kept = plan("1f1b", 2, 6), []

    class Leaking(ToyStage):
        def forward(self, microbatch: int, x: np.ndarray | None) -> Done:
            done = super().forward(microbatch, x)
            kept.append(done.saved)
            return done

    class Leaky(Toy):
        @property
        def stages(self) -> list[ToyStage]:
            return [ToyStage(self, 0), Leaking(self, 1)]

    given = toy(2, 6)
    assert run(Leaky(given.w1, given.w2, given.x, given.y), schedule).peak == (2, 6)
    assert memory.peak(schedule) == run(given, schedule).peak == (2, 1)


def test_a_pair_needs_both_of_its_messages_before_either_half_runs() -> None:
    schedule = plan("dualpipe", 4, 8)
    order = in_order(schedule)
    made = {part: place for place, (_, entry) in enumerate(order) for part in entry.parts}
    tried = 0
    for place, (rank, entry) in enumerate(order):
        if not isinstance(entry, Pair) or entry.forward.stage == 0 or entry.backward.stage == 3:
            continue
        _, stage, microbatch = entry.backward
        last = max(made.get(Action(kind, stage + 1, microbatch), -1) for kind in "BI")
        before = max(i for i in range(place) if order[i][0] == rank)
        if last < max(before, made[Action("F", entry.forward.stage - 1, entry.forward.microbatch)]):
            continue  # its gradient is not what it waits for
        net = toy(4, 8)
        with pytest.raises(KeyError):
            run(net, schedule, order=[*order[:last], (rank, entry)])
        assert len(net.calls) == sum(part.kind != "W" for _, one in order[:last] for part in one.parts)
        tried += 1
    assert tried


def test_directions_are_the_microbatches_that_take_the_same_ranks() -> None:
    assert directions(plan("dualpipe", 4, 8)) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert directions(plan("dualpipev", 2, 4)) == ((0, 1, 2, 3),)
    assert directions(plan("1f1b", 3, 3)) == ((0, 1, 2),)


class TestBadInput:
    def test_a_network_of_other_stages_or_microbatches(self) -> None:
        with pytest.raises(Invalid) as caught:
            run(toy(3, 4), plan("1f1b", 2, 4))
        one_sentence(caught, "3 stages", "for 2")
        with pytest.raises(Invalid) as caught:
            run(toy(2, 5), plan("1f1b", 2, 4))
        one_sentence(caught, "5 microbatches", "for 4")

    def test_an_illegal_schedule(self) -> None:
        good = plan("zb1p", 2, 3)
        own = tuple(entry for entry in good.ranks[1] if entry != Action("W", 1, 2))
        bad = Schedule(good.name, 3, 2, good.placement, (good.ranks[0], own))
        with pytest.raises(Invalid) as caught:
            run(toy(2, 3), bad)
        one_sentence(caught, "not legal", "rank 1")

    def test_another_rule_of_release(self) -> None:
        with pytest.raises(Invalid) as caught:
            run(toy(2, 3), plan("1f1b", 2, 3), release="B")
        one_sentence(caught, "'B'", "'W'", "'I'")


class TestBuffers:
    def test_a_buffer_counts_once_and_a_view_is_the_whole(self) -> None:
        x = np.zeros((4, 4))
        assert list(buffers([x, x[:1], Operand(x.T), {"a": (x,)}]).values()) == [x.nbytes]
        assert list(buffers(x[:1]).values()) == [x.nbytes]

    def test_what_is_ignored_is_not_counted(self) -> None:
        x, y = np.zeros(3), np.zeros(5)
        assert list(buffers((x, y[1:]), buffers(y)).values()) == [x.nbytes]

    def test_what_is_kept_in_another_form_takes_what_it_says(self) -> None:
        class Coded(Operand):
            @property
            def nbytes(self) -> int:
                return 3

        assert list(buffers([coded := Coded(np.zeros(9)), coded]).values()) == [3]

    def test_nothing_else_is_looked_into(self) -> None:
        assert buffers(["text", 3, None, object(), Operand]) == {}


def test_equal_bits_are_not_vacuous() -> None:
    """Another association gives other bits, so that equality above says something."""
    net = toy(4, 10)
    _, one = unpipelined(net, ways_of("1f1b", 10))
    _, two = unpipelined(net, ways_of("dualpipe", 10))
    assert any(bits(one[name]) != bits(two[name]) for name in one)
