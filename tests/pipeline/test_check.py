"""The checker finds what is wrong, says where, and finds nothing else.  SPEC PIPE-12 to PIPE-18."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from pipeline.mutations import MUTATIONS, Mutation, is_legal, mutated
from recorded_orders import orders, recorded
from support import one_sentence

from refimpl.errors import Invalid
from refimpl.pipeline.check import MOST_FINDINGS, Finding, check
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import MOST, Action, Entry, Pair, Schedule
from refimpl.pipeline.waits import receives_ahead


def actions(text: str) -> tuple[Entry, ...]:
    """F0.1 is F of stage 0 on microbatch 1; F0.1&B1.0 is a pair."""

    def action(word: str) -> Action:
        stage, microbatch = word[1:].split(".")
        return Action(word[0], int(stage), int(microbatch))

    return tuple(Pair(*map(action, w.split("&"))) if "&" in w else action(w) for w in text.split())


def two(first: str, second: str, microbatches: int = 2) -> Schedule:
    """Two ranks with a stage each."""
    return Schedule("own", microbatches, 2, ((0,), (1,)), (actions(first), actions(second)))


def is_sentence(finding: Finding) -> bool:
    return str(finding).endswith(".") and not str(finding).endswith("..") and "\n" not in str(finding)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(f) for f in findings]
    assert is_sentence(findings[0])
    return findings[0]


FIRST, SECOND = "F0.0 F0.1 B0.0 B0.1", "F1.0 B1.0 F1.1 B1.1"


class TestFindings:
    def test_a_legal_schedule_has_none(self) -> None:
        assert check(two(FIRST, SECOND)) == []

    def test_halves_and_whole_backwards_may_be_mixed(self) -> None:
        assert check(two("F0.0 F0.1 I0.0 B0.1 W0.0", SECOND)) == []

    def test_a_missing_forward_is_missed_where_its_backward_is(self) -> None:
        finding = only(check(two(FIRST, "F1.0 B1.0 B1.1")))
        assert (finding.rule, finding.rank, finding.position) == ("missing", 1, None)
        assert str(finding) == (
            "rank 1: F of stage 1, microbatch 1 is missing, "
            "which B of stage 1, microbatch 1 needs, position 2 of rank 1."
        )

    def test_a_missing_backward_says_who_needs_it(self) -> None:
        finding = only(check(two(FIRST, "F1.0 F1.1 B1.1")))
        assert finding.action == Action("B", 1, 0)
        assert "there are no I and W in its place" in str(finding)
        assert "B of stage 0, microbatch 0 needs, position 2 of rank 0" in str(finding)

    @pytest.mark.parametrize(("half", "lacks"), [("I", "W"), ("W", "I")])
    def test_half_a_backward_misses_the_other_half(self, half: str, lacks: str) -> None:
        finding = only(check(two(FIRST, f"F1.0 B1.0 F1.1 {half}1.1")))
        assert (finding.rule, finding.rank, finding.action) == ("missing", 1, Action(lacks, 1, 1))

    def test_what_is_done_twice_names_both_places(self) -> None:
        finding = only(check(two(FIRST, "F1.0 B1.0 F1.1 F1.0 B1.1")))
        assert (finding.rule, finding.rank, finding.position) == ("repeated", 1, 3)
        assert "also at position 0 of rank 1" in str(finding)

    def test_of_two_places_the_one_with_the_rest_of_the_microbatch_counts(self) -> None:
        schedule = plan("dualpipe", 2, 4)
        wrong = replace(schedule, ranks=((Action("F", 1, 0), *schedule.ranks[0]), schedule.ranks[1]))
        finding = only(check(wrong))
        assert (finding.rule, finding.rank, finding.position) == ("repeated", 0, 0)

    def test_a_backward_is_whole_or_in_halves_but_not_both(self) -> None:
        finding = only(check(two(FIRST, "F1.0 B1.0 W1.0 F1.1 B1.1")))
        assert (finding.rule, finding.rank, finding.position) == ("repeated", 1, 2)

    def test_a_stage_is_done_where_it_is_held(self) -> None:
        finding = only(check(two("F0.0 F0.1 F1.1 B0.0 B1.1 B0.1", "F1.0 B1.0"))[:1])
        assert (finding.rule, finding.rank, finding.position) == ("stage", 0, 2)
        assert "rank 1 does" in str(finding)

    def test_forward_and_backward_are_on_the_same_copy(self) -> None:
        schedule = plan("dualpipe", 2, 4)
        rows = [list(own) for own in schedule.ranks]
        last = [e for e in rows[0] if e.parts[0].kind == "W"][-1]
        rows[0].remove(last)
        rows[1].append(last)
        finding = only(check(replace(schedule, ranks=tuple(tuple(own) for own in rows))))
        assert (finding.rule, finding.rank, finding.position) == ("rank", 1, len(rows[1]) - 1)

    @pytest.mark.parametrize("word", ["F2.0", "F-1.0", "F0.2", "X0.0", "F0.-1"])
    def test_what_is_no_action_is_unknown(self, word: str) -> None:
        finding = only(check(two(f"{FIRST} {word}", SECOND)))
        assert (finding.rule, finding.rank, finding.position) == ("unknown", 0, 4)
        assert "2 stages and 2 microbatches" in str(finding)

    def test_a_pair_is_a_forward_and_a_whole_backward(self) -> None:
        findings = check(two("F0.0 F0.1&F0.1 B0.0 B0.1", SECOND))
        assert {f.rule for f in findings} == {"unknown", "repeated"}
        assert all(map(is_sentence, findings))
        assert {(f.rank, f.position) for f in findings} == {(0, 1)}

    def test_an_action_comes_after_what_it_needs_on_the_rank(self) -> None:
        finding = only(check(two("F0.0 F0.1 W0.0 I0.0 B0.1", SECOND)))
        assert (finding.rule, finding.rank, finding.position) == ("order", 0, 2)
        assert str(finding) == (
            "rank 0, position 2: W of stage 0, microbatch 0 comes before "
            "I of stage 0, microbatch 0, position 3, which it needs."
        )

    def test_and_not_in_the_same_pair(self) -> None:
        finding = only(check(two(FIRST, "F1.0&B1.0 F1.1 B1.1")))
        assert (finding.rule, finding.rank, finding.position) == ("order", 1, 0)
        assert "is in one pair with F of stage 1, microbatch 0" in str(finding)

    @pytest.mark.parametrize(
        ("change", "fragment"),
        [
            ({"microbatches": 0}, "2, 2 and 0"),
            ({"stages": 0}, "2, 0 and 2"),
            ({"ranks": ()}, "0, 2 and 2"),
            ({"placement": ((0, 1),)}, "for 1 ranks, but there are 2"),
            ({"placement": ((0,), (0,))}, "no rank holds stage 1"),
            ({"placement": ((0,), (1, 7))}, "rank 1 is to hold stage 7"),
        ],
    )
    def test_the_shape_comes_first(self, change: dict[str, object], fragment: str) -> None:
        findings = check(replace(two(FIRST, SECOND), **change))
        assert {f.rule for f in findings} == {"shape"}
        assert all(map(is_sentence, findings))
        assert fragment in str(findings[0])


class TestDeadlock:
    # Rank 0 wants a gradient before it sends microbatch 1, rank 1 wants microbatch 1 before it sends that.
    CROSSED = two("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1")

    def test_a_cycle_is_written_out(self) -> None:
        finding = only(check(self.CROSSED))
        assert finding.rule == "deadlock"
        assert finding.ranks == {0, 1}
        assert str(finding) == (
            "the ranks 0, 1 wait for each other: "
            "rank 0 at position 1 waits with B of stage 0, microbatch 0 for B of stage 1, microbatch 0, "
            "position 2 of rank 1; rank 1 at position 1 waits with F of stage 1, microbatch 1 "
            "for F of stage 0, microbatch 1, position 2 of rank 0."
        )

    def test_each_wait_is_for_a_place_behind_that_of_the_next(self) -> None:
        draw, found = random.Random(3), 0
        schedule = plan("zbv", 4, 9)
        reverse = next(m for m in MUTATIONS if m.__name__ == "reverse")
        while found < 20:
            wrong, touched = mutated(draw, schedule, reverse) or (schedule, set())
            for finding in check(wrong):
                ring = finding.cycle
                for wait, after in zip(ring, ring[1:] + ring[:1], strict=True):
                    assert wait.other == after.rank
                    assert wait.until >= after.position
                    assert wait.needed in wrong.ranks[wait.other][wait.until].parts
                    assert wait.action in wrong.ranks[wait.rank][wait.position].parts
                    found += 1
                if ring:
                    assert touched <= finding.ranks

    def test_ranks_outside_of_the_cycle_are_not_accused(self) -> None:
        schedule = plan("1f1b", 4, 6)
        rows = [list(own) for own in schedule.ranks]
        rows[1] = rows[1][::-1]
        rows[1].sort(key=lambda e: e.parts[0].kind)  # all backwards first
        findings = check(replace(schedule, ranks=tuple(tuple(own) for own in rows)))
        assert {f.rank for f in findings if f.rule == "order"} == {1}

    def test_a_pair_waits_for_both_inputs(self) -> None:
        fine = two("F0.0 F0.1&B0.0 B0.1", "F1.0 B1.0 F1.1 B1.1")
        assert check(fine) == []
        stuck = only(check(two("F0.0 F0.1&B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1")))
        assert stuck.rule == "deadlock"
        assert stuck.ranks == {0, 1}


class TestRendezvous:
    def test_1f1b_needs_no_receive_ahead(self) -> None:
        assert check(plan("1f1b", 8, 20), ahead=0) == []

    def test_a_receiver_that_comes_late_holds_the_sender(self) -> None:
        """Rank 0 does all forwards first and rank 1 alternates: gradients find no place to land."""
        late = two("F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3", "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3", 4)
        assert check(late) == []
        finding = only(check(late, ahead=1))
        assert (finding.rule, finding.ranks) == ("rendezvous", {0, 1})
        assert str(finding) == (
            "under rendezvous the ranks 0, 1 wait for each other: "
            "rank 0 at position 4 waits with its message of F of stage 0, microbatch 3 "
            "for the receive of F of stage 1, microbatch 3, after position 4 of rank 1; "
            "rank 1 at position 4 waits with its message of B of stage 1, microbatch 1 "
            "for the receive of B of stage 0, microbatch 1, after position 4 of rank 0."
        )
        assert check(late, ahead=2) == []
        assert receives_ahead(late) == 2

    def test_agrees_with_running_the_batches(self) -> None:
        draw = random.Random(8)
        names = [("zbv", 3, 7), ("dualpipe", 4, 8), ("interleaved", 3, 9), ("gpipe", 3, 4), ("zb1p", 4, 6)]
        verdicts = Counter[bool]()
        for schedule in (plan(*draw.choice(names)) for _ in range(150)):
            for mutation in draw.choices([m for m in MUTATIONS if m.__name__ in ("swap", "reverse")], k=3):
                changed = mutated(draw, schedule, mutation)
                if changed is not None and is_legal(changed[0]):
                    schedule = changed[0]
            for ahead in (0, 1, 2):
                free = runs_in_batches(schedule, ahead)
                assert (check(schedule, ahead) == []) == free
                verdicts[free] += 1
        assert min(verdicts[True], verdicts[False]) > 50

    @pytest.mark.parametrize("rule", ["gpipe", "1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"])
    def test_one_receive_ahead_is_enough_for_the_published_schedules(self, rule: str) -> None:
        for ranks, microbatches in ((2, 4), (4, 8), (4, 14), (6, 12), (8, 20), (8, 32)):
            needed = receives_ahead(plan(rule, ranks, microbatches))
            assert needed == (0 if rule in ("gpipe", "1f1b", "zb1p") else 1)

    def test_longer_groups_than_ranks_need_more(self) -> None:
        """The first rank is given what it comes to only after the rest of the group."""
        for group, more in ((4, 1), (8, 4), (16, 9)):
            schedule = plan("interleaved", 4, 16, 2, group)
            assert receives_ahead(schedule) == more
            assert runs_in_batches(schedule, more)
            assert not runs_in_batches(schedule, more - 1)

    def test_a_deadlock_without_rendezvous_has_no_number(self) -> None:
        assert receives_ahead(TestDeadlock.CROSSED) is None


def runs_in_batches(schedule: Schedule, ahead: int) -> bool:
    """The model of waits.py, run: receives that are posted, messages that are met, entries that start."""
    where = {a: r for r, _, a in schedule.actions()}
    last = schedule.stages - 1

    def received(rank: int, entry: Entry) -> list[Action]:
        """Receivers of messages; each action gets at most one."""
        made = []
        for action in entry.parts:
            kind, stage, microbatch = action
            if kind == "F" and stage > 0:
                source = where["F", stage - 1, microbatch]
            elif kind in "BI" and stage < last:
                whole = Action("B", stage + 1, microbatch)
                source = where[whole if whole in where else whole._replace(kind="I")]
            else:
                continue
            if source != rank:
                made.append(action)
        return made

    def sent(rank: int, entry: Entry) -> list[Action]:
        to = []
        for kind, stage, microbatch in entry.parts:
            step = 1 if kind == "F" else -1
            if kind != "W" and 0 <= stage + step <= last:
                for other in "F" if kind == "F" else "BI":
                    action = Action(other, stage + step, microbatch)
                    if action in where and where[action] != rank:
                        to.append(action)
        return to

    ranks = range(schedule.size)
    ended = [0 for _ in ranks]
    arrived: set[Action] = set()  # messages whose sender has made them
    posted: set[Action] = set()

    def stream(action: Action) -> tuple[int, bool]:
        return action.stage, action.kind == "F"

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            entries = schedule.ranks[rank]
            used = Counter(stream(a) for e in entries[: ended[rank]] for a in received(rank, e))
            due = Counter(used)
            for entry in entries[ended[rank] :]:
                for action in received(rank, entry):
                    here = ended[rank] < len(entries) and entry is entries[ended[rank]]
                    if due[stream(action)] < used[stream(action)] + ahead or here:
                        posted.add(action)
                    due[stream(action)] += 1
        for rank in ranks:
            entries, now = schedule.ranks[rank], ended[rank]
            if now < len(entries):
                before = sent(rank, entries[now - 1]) if now else []
                own = received(rank, entries[now])
                local = all(a in arrived for a in own) and all(a in posted for a in before)
                if local:
                    ended[rank] += 1
                    arrived.update(sent(rank, entries[now]))
                    moved = True
    return all(ended[rank] == len(schedule.ranks[rank]) for rank in ranks)


@pytest.mark.parametrize("source", sorted({name.split("_")[0] for name in orders()}))
def test_every_recorded_order_is_legal(source: str) -> None:
    for name in orders():
        if name.startswith(source):
            assert check(recorded(name)) == [], name


SCHEDULES: tuple[tuple[object, ...], ...] = (
    ("gpipe", 4, 6),
    ("1f1b", 4, 8),
    ("1f1b", 5, 3),
    ("interleaved", 3, 6, 3),
    ("interleaved", 2, 6, 3, 4),
    ("zb1p", 4, 8),
    ("zbv", 3, 7),
    ("zbv", 4, 3),
    ("dualpipe", 2, 4),
    ("dualpipe", 4, 10),
    ("dualpipe", 6, 12),
    ("dualpipev", 3, 7),
    ("dualpipev", 4, 9),
)


class TestMutations:
    """Of 1000 mutations that are illegal by brute force, all are found, with a rank that was touched."""

    COUNT = 1000

    def test_illegal_mutations_are_rejected_with_the_right_rank(self) -> None:
        draw = random.Random(20241226)
        tally = Counter[str]()
        kinds = Counter[str]()
        while tally["illegal"] < self.COUNT:
            mutation = MUTATIONS[draw.randrange(len(MUTATIONS))]
            changed = mutated(draw, plan(*draw.choice(SCHEDULES)), mutation)
            if changed is None or is_legal(changed[0]):
                continue
            wrong, touched = changed
            kinds[mutation.__name__] += 1
            tally["illegal"] += 1
            findings = check(wrong)
            tally["rejected"] += bool(findings)
            tally["named"] += any(finding.ranks & touched for finding in findings)
            tally["named first"] += bool(findings and findings[0].ranks & touched)
        assert min(kinds[m.__name__] for m in MUTATIONS) >= 50  # none of the kinds is missing
        assert tally["rejected"] == self.COUNT
        assert tally["named"] == self.COUNT
        assert tally["named first"] >= 0.99 * self.COUNT

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
    def test_what_is_still_legal_is_not_rejected(self, mutation: Mutation) -> None:
        draw = random.Random(mutation.__name__)
        for _ in range(150):
            changed = mutated(draw, plan(*draw.choice(SCHEDULES)), mutation)
            if changed is not None:
                assert (check(changed[0]) == []) == is_legal(changed[0])


class TestBounds:
    def test_a_schedule_that_claims_to_be_huge_is_refused(self) -> None:
        huge = Schedule("own", 10**15, 10**15, ((0,),), (actions("F0.0"),))
        with pytest.raises(Invalid) as caught:
            check(huge)
        one_sentence(caught, str(MOST), str(10**15))

    def test_receives_ahead_are_not_negative(self) -> None:
        with pytest.raises(Invalid) as caught:
            check(two(FIRST, SECOND), ahead=-1)
        one_sentence(caught, "ahead is -1", "at least 0")

    def test_there_is_an_end_to_findings(self) -> None:
        empty = Schedule("own", 10_000, 1, ((0,),), ((),))
        assert len(check(empty)) == MOST_FINDINGS

    def test_the_time_is_linear(self) -> None:
        def seconds(work: Callable[[], object]) -> float:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            return min(times)

        small, large = plan("dualpipe", 8, 128), plan("dualpipe", 16, 512)
        ratio = seconds(lambda: check(large)) / seconds(lambda: check(small))
        assert ratio < 32, "8 times as many actions; a square would be 64"
