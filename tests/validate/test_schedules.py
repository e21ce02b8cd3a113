"""Ports against cases of kind schedule: integers in words, any integer type, what a port declares."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ports import pipeline_engine

from refimpl.checkpoint import safetensors
from refimpl.cli import main
from refimpl.errors import Invalid, Unreadable
from refimpl.validate import report
from refimpl.validate.given import PortCase
from refimpl.validate.verdict import Verdict, check

GOLDEN = Path(__file__).parent.parent.parent / "golden"

SMALL, LARGE = "schedule/1f1b-4x10", "schedule/interleaved-4x16-v2-g8"  # of the second only samples are kept


def right(id: str) -> dict[str, np.ndarray]:
    case = PortCase.open(GOLDEN / id)
    found = pipeline_engine.run(case)
    assert found is not None
    return {name: np.ascontiguousarray(x, np.int64) for name, x in found.items()}


@pytest.fixture
def judge(tmp_path):
    def run(id: str, tensors: dict[str, np.ndarray], claim: str | None = None) -> Verdict:
        safetensors.write(tmp_path / "out.safetensors", tensors)
        return check(GOLDEN / id, tmp_path / "out.safetensors", claim)

    return run


def test_the_right_orders_and_times_hold_in_any_integer_type(judge):
    own = right(SMALL)
    for dtype in (np.int64, np.int32, np.int16):
        verdict = judge(SMALL, {name: x.astype(dtype) for name, x in own.items()})
        assert verdict.holds
        assert verdict.claim == "bits"
    assert "It holds." in report.text(verdict)
    json.loads(report.to_json(verdict))


def test_a_wrong_entry_is_said_with_rank_and_position(judge):
    own = right(SMALL)
    own["order"][2, [3, 4]] = own["order"][2, [4, 3]]
    first = judge(SMALL, own).first_off
    assert first.name == "order"
    assert first.at == (2, 3)
    assert first.note == (
        "rank 2, position 3: B of stage 2 on microbatch 1 instead of F of stage 2 on microbatch 2; "
        "2 of 80 differ"
    )


def test_a_pair_is_said_as_two(judge):
    case = PortCase.open(GOLDEN / "schedule/dualpipe-2x4")
    expected = safetensors.open_file(case.folder / "expected.safetensors")
    own = {name: expected[name].copy() for name in case.outputs}
    at = tuple(np.argwhere(own["order"][..., 0] == 4)[0])
    own["order"][at] = [0, *own["order"][at][1:3], -1, -1]
    note = judge("schedule/dualpipe-2x4", own).first_off.note
    assert " with B of stage " in note.partition("instead of")[2]
    assert " with " not in note.partition("instead of")[0]


@pytest.mark.parametrize(
    ("name", "at", "note"),
    [
        ("makespan", (1,), "durations 1: {theirs} instead of {ours}; 1 of 2 differ"),
        ("busy", (0, 2), "durations 0, rank 2: {theirs} instead of {ours}; 1 of 8 differ"),
        ("idle_within_span", (1, 3), "durations 1, rank 3: {theirs} instead of {ours}; 1 of 8 differ"),
        ("peak.released_at_W", (3,), "rank 3: {theirs} instead of {ours}; 1 of 4 differ"),
        (
            "start",
            (0, 1, 3),
            "durations 0, rank 1, position 3 (B of stage 1 on microbatch 0): {theirs} instead of {ours}; "
            "1 of 160 differ",
        ),
    ],
)
def test_a_number_that_is_one_off_is_said_with_its_place(judge, name, at, note):
    own = right(SMALL)
    ours = int(own[name][at])
    own[name][at] += 1
    first = judge(SMALL, own).first_off
    assert (first.name, first.at) == (name, at)
    assert first.note == note.format(theirs=ours + 1, ours=ours)


def test_copies_are_said_by_stage(judge):
    found = judge(SMALL, {**right(SMALL), "copies": np.array([1, 1, 2, 1])})
    assert found.first_off.note == "stage 2: 2 instead of 1; 1 of 4 differ"


def test_where_only_samples_are_kept_the_first_difference_is_named_all_the_same(judge):
    from refimpl.pipeline import arrays

    case = PortCase.open(GOLDEN / LARGE)
    expected = safetensors.open_file(case.folder / "expected.safetensors")
    assert "order" not in expected
    own = arrays.planned(case.arguments)
    assert judge(LARGE, own).holds
    own["order"] = own["order"].copy()
    own["order"][3, 60, 2] += 1
    first = judge(LARGE, own).first_off
    assert first.at == (3, 60)
    assert first.note.startswith("rank 3, position 60: ")
    assert first.note.endswith("; 1 of 256 differ")


def test_padding_may_be_longer_and_an_entry_too_many_is_named(judge):
    own = right(SMALL)
    longer = np.pad(own["order"], [(0, 0), (0, 2), (0, 0)], constant_values=-1)
    assert judge(SMALL, own | {"order": longer}).holds
    longer[1, 20, :3] = (0, 1, 9)
    first = judge(SMALL, own | {"order": longer}).first_off
    assert first.note.startswith("rank 1, position 20: F of stage 1 on microbatch 9 instead of nothing")
    shorter = judge(SMALL, own | {"order": own["order"][:, :-1]}).first_off
    assert shorter.note.startswith("rank 0, position 19: nothing instead of B of stage 0 on microbatch 9")


def test_what_is_no_entry_is_said_as_it_is(judge):
    own = right(SMALL)
    own["order"][0, 0] = (7, 0, 0, -1, -1)
    assert "[7, 0, 0, -1, -1] is no entry of an order instead of F of" in judge(SMALL, own).first_off.note


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"busy": np.zeros((2, 4))}, "dtype F64 instead of an integer type"),
        ({"busy": np.zeros((4, 2), np.int64)}, "shape (4, 2) instead of (2, 4)"),
        ({"order": np.zeros((5, 20, 5), np.int64)}, "shape (5, 20, 5) instead of (4, 20, 5)"),
        ({"order": np.zeros((4, 20), np.int64)}, "shape (4, 20) instead of (4, 20, 5)"),
    ],
)
def test_other_types_and_shapes_are_malformed(judge, change, note):
    first = judge(SMALL, right(SMALL) | change).first_off
    assert (first.verdict, first.note) == ("malformed", note)


def test_a_missing_order_is_missed_and_a_missing_start_is_not(judge):
    own = right(SMALL)
    assert judge(SMALL, {n: x for n, x in own.items() if n != "start"}).holds
    first = judge(SMALL, {n: x for n, x in own.items() if n != "order"}).first_off
    assert (first.name, first.verdict) == ("order", "missing")


@pytest.mark.parametrize(
    ("id", "ranks", "off"),
    [
        ("illegal-deadlock-1f1b", (0, 1), 2),
        ("illegal-wrong-rank-1f1b", (1, 2), 0),
        ("legal-late-w", (-1,), 1),
    ],
)
def test_any_rank_at_fault_may_be_named(judge, id, ranks, off):
    own = right(f"schedule/{id}")
    for rank in ranks:
        assert judge(f"schedule/{id}", own | {"rank": np.array([rank])}).holds
    first = judge(f"schedule/{id}", own | {"rank": np.array([off])}).first_off
    assert first.note == f"rank {off} is named instead of {' or '.join(map(str, ranks))}"


def test_a_checker_that_passes_what_is_illegal_is_told_what_it_overlooked(judge):
    first = judge("schedule/illegal-dropped-w-zb1p", {"illegal": np.array([0])}).first_off
    assert first.note == "0 instead of 1: rank 2: W of stage 2, microbatch 2 is missing"
    first = judge("schedule/legal-unpaired", {"illegal": np.array([1])}).first_off
    assert first.note == "1 instead of 0: no rule is broken"


def test_another_claim_is_refused(judge):
    with pytest.raises(Invalid, match="compares bits, but bf16 was claimed"):
        judge(SMALL, right(SMALL), "bf16")


def test_an_order_without_entries_is_no_error(judge):
    first = judge(SMALL, right(SMALL) | {"order": np.zeros((4, 0, 5), np.int64)}).first_off
    assert first.note.startswith("rank 0, position 0: nothing instead of F of stage 0 on microbatch 0")


@pytest.mark.parametrize(
    ("there", "other"),
    [
        ('"schedule": "1f1b"', '"schedules": "1f1b"'),
        ('"component": "plan"', '"component": "plans"'),
        ('"durations": [', '"durations": [7, '),
        ('"latency": 1', '"latencies": 1'),
        ('"ranks": 4', '"ranks": 4000000'),
    ],
)
def test_a_case_that_describes_nothing_is_one_sentence(tmp_path, capsys, there, other):
    shutil.copytree(GOLDEN / SMALL, tmp_path / "case")
    path = tmp_path / "case/case.json"
    text = path.read_text()
    assert there in text
    path.write_text(text.replace(there, other))
    safetensors.write(tmp_path / "output.safetensors", right(SMALL))
    assert main(["check", str(tmp_path / "case"), str(tmp_path / "output.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_case_that_is_not_what_is_computed_here_is_no_yardstick(judge, tmp_path):
    shutil.copytree(GOLDEN / SMALL, tmp_path / "case")
    path = tmp_path / "case/case.json"
    path.write_text(path.read_text().replace('"latency": 1', '"latency": 2'))
    safetensors.write(tmp_path / "output.safetensors", right(SMALL))
    with pytest.raises(Unreadable, match="start is not what is computed here"):
        check(tmp_path / "case", tmp_path / "output.safetensors")


def test_a_port_of_two_rules_and_a_checker_holds(tmp_path, capsys):
    port = GOLDEN.parent / "tests/ports/pipeline_engine.py"
    told = tmp_path / "told.json"
    words = ["validate", "--port", str(port), "--cases", str(GOLDEN), "--suite", "schedule"]
    assert main([*words, "--json", str(told)]) == 0
    assert "28 of 28 cases hold" in capsys.readouterr().out
    assert told.exists()


def test_a_port_of_orders_alone_says_so(tmp_path, capsys):
    port = tmp_path / "engine.py"
    source = (GOLDEN.parent / "tests/ports/pipeline_engine.py").read_text()
    port.write_text(source.replace("def run(case)", "def whole(case)") + ORDERS_ALONE)
    words = ["validate", "--port", str(port), "--cases", str(GOLDEN), "--suite", "schedule"]
    assert main(words) == 1
    assert "missing, it is required" in capsys.readouterr().out
    (tmp_path / "port.toml").write_text('components = ["plan"]\noutputs = ["order"]\n')
    assert main(words) == 0
    assert "4 of 4 cases hold" in capsys.readouterr().out


ORDERS_ALONE = """

def run(case):
    found = whole(case)
    return {"order": found["order"]} if found and "order" in found else None
"""
