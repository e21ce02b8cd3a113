"""`refimpl pipeline`: statuses, sentences, files and standard output.  SPEC PIPE-47 to PIPE-49."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from refimpl import cli
from refimpl.pipeline import exchange
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Action
from refimpl.pipeline.simulate import said

SIZE = ("--ranks", "4", "--microbatches", "10")
Run = Any


@pytest.fixture
def run(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in an empty folder: (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[Any, str, str]:
        try:
            status: Any = cli.main(["pipeline", *arguments])
        except SystemExit as leave:  # argparse
            status = leave.code
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


@pytest.mark.parametrize("name", RULES)
def test_every_schedule_has_its_table(name: str, run: Run) -> None:
    status, out, err = run(name, *SIZE)
    assert (status, err) == (0, "")
    assert out.startswith(RULES[name].title)
    assert "makespan" in out
    assert "published" in out


def test_times_and_latency_are_those_given(run: Run) -> None:
    _, out, _ = run("dualpipe", *SIZE, "--times", "10,12,9,21,25", "--latency", "3")
    assert "F 10, B 21, I 12, W 9, F&B 25, latency 3: makespan 330, idle 50 (15.2%)" in out
    assert "does not apply" in out


def test_times_may_be_nanoseconds(run: Run) -> None:
    status, out, _ = run("1f1b", *SIZE, "--times", "12500000,14000000,11000000", "--latency", "1000000000000")
    assert (status, "B 25000000, latency 1000000000000: makespan" in out) == (0, True)


def test_chunks_and_group_go_to_the_schedule(run: Run) -> None:
    run("interleaved", *SIZE, "--chunks", "3", "--group", "5", "--json", "a.json")
    assert exchange.read("a.json").schedule == plan("interleaved", 4, 10, 3, 5)


def test_files_are_written_and_named(run: Run) -> None:
    files = {"plot": "a.svg", "trace": "a.trace", "csv": "a.csv", "json": "a.json"}
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    status, out, _ = run(
        "zbv", *SIZE, *(part for kind, name in files.items() for part in (f"--{kind}", name))
    )
    assert status == 0
    assert out.splitlines()[-4:] == ["picture: a.svg", "trace: a.trace", "csv: a.csv", "json: a.json"]
    assert sorted(path.name for path in Path().iterdir()) == sorted(files.values())
    assert Path("a.svg").read_bytes().startswith(b"<?xml")
    assert json.loads(Path("a.trace").read_text())["traceEvents"]
    for name in ("a.csv", "a.json"):
        assert exchange.read(name).schedule.ranks == plan("zbv", 4, 10).ranks
    found = json.loads(Path("a.json").read_text())
    assert tuple(found) == (*exchange.KEYS, "metrics")


@pytest.mark.parametrize("kind", ["plot", "trace", "csv", "json"])
def test_standard_output_can_take_one_of_them_in_place_of_the_table(kind: str, run: Run) -> None:
    if kind == "plot":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run("1f1b", *SIZE, f"--{kind}", "a.svg")
    _, out, err = run("1f1b", *SIZE, f"--{kind}", "-")
    assert (out, err) == (Path("a.svg").read_bytes().decode(), "")


def test_compare_has_one_table_one_picture_one_trace_one_file(run: Run) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = ("1f1b", "interleaved", "dualpipe")
    options = ("--chunks", "2", "--group", "5", "--plot", "a.png", "--trace", "a.trace", "--json", "a.json")
    status, out, _ = run("compare", *names, *SIZE, *options)
    assert status == 0
    assert [out.count(RULES[name].title) for name in names] == [2, 1, 1]  # 1F1B is in Interleaved 1F1B
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("a.json").read_text())["schedules"]
    assert [one["schedule"] for one in found] == list(names)
    assert [one["metrics"]["durations"]["F"] for one in found] == [2, 1, 2]
    assert exchange.from_dict(found[1], "x") == plan("interleaved", 4, 10, 2, 5)
    events = json.loads(Path("a.trace").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2}


BAD = [
    (("dualpipe", "--ranks", "3", "--microbatches", "10"), ("dualpipe", "even", "3")),
    (("dualpipe", "--ranks", "4", "--microbatches", "6"), ("dualpipe", "8", "6")),
    (("dualpipev", "--ranks", "4", "--microbatches", "7"), ("dualpipev", "7")),
    (("dualpipe", "--ranks", "0", "--microbatches", "6"), ("--ranks", "'0'", "from 1")),
    (("1f1b", "--ranks", "x", "--microbatches", "6"), ("--ranks", "'x'")),
    (("1f1b", "--ranks", "2", "--microbatches", "-6"), ("--microbatches", "'-6'")),
    (("1f1b", "--ranks", "2", "--microbatches", "1.5"), ("--microbatches", "'1.5'")),
    (("1f1b", "--ranks", "1048576", "--microbatches", "1048576"), ("at most",)),
    (("1f1b", "--ranks", "9" * 30, "--microbatches", "1"), ("--ranks",)),
    (("1f1b", "--ranks", "1" + "0" * 5000, "--microbatches", "1"), ("--ranks", "'1000")),
    (("1f1b", "--ranks", "0" * 20 + "9" * 5000, "--microbatches", "1"), ("--ranks", "'0000")),
    (("1f1b", *SIZE, "--chunks", "2"), ("1f1b", "chunks", "2")),
    (("1f1b", *SIZE, "--group", "5"), ("1f1b", "group", "5")),
    (("interleaved", *SIZE, "--group", "3"), ("group", "3")),
    (("interleaved", *SIZE, "--chunks", "0"), ("--chunks", "'0'")),
    (("1f1b", *SIZE, "--times", "1,2"), ("--times", "'1,2'", "three to five")),
    (("1f1b", *SIZE, "--times", "1,2,3,4,5,6"), ("--times", "three to five")),
    (("1f1b", *SIZE, "--times", ""), ("--times", "three to five")),
    (("1f1b", *SIZE, "--times", "-1,1,1"), ("--times", "'-1,1,1'", "from 0")),
    (("1f1b", *SIZE, "--times=1,-1,1"), ("--times", "'1,-1,1'")),
    (("1f1b", *SIZE, "--times", "1,,1"), ("--times", "'1,,1'")),
    (("1f1b", *SIZE, "--times", "1.5,1,1"), ("--times", "whole number")),
    (("1f1b", *SIZE, "--times", "F,I,W"), ("--times", "'F,I,W'")),
    (("1f1b", *SIZE, "--latency", "-3"), ("--latency", "'-3'")),
    (("1f1b", *SIZE, "--latency", "0" * 20 + "5" * 5000), ("--latency", "'0000")),
    (("1f1b", *SIZE, "--times", "1,1,1000000000001"), ("--times", "each part", "to 1000000000000")),
    (("1f1b", *SIZE, "--plot", "a.gif"), ("a.gif", ".svg or .png")),
    (("1f1b", *SIZE, "--csv", "-", "--json", "-"), ("- is given", "each must have its own")),
    (("1f1b", *SIZE, "--csv", "a", "--json", "a"), ("a is given", "each must have its own")),
    (("1f1b", *SIZE, "--csv", ""), ("''", "a name")),
    (("1f1b", *SIZE, "--csv", "."), ("'.'", "a name")),
    (("1f1b", *SIZE, "--json", "none/a.json"), ("none/a.json", "no folder none")),
    (("compare", "1f1b", "nonsense", *SIZE), ("'nonsense'", "dualpipev")),
    (("compare", "1f1b", "dualpipe", "--ranks", "3", "--microbatches", "6"), ("even", "3")),
    (("check", "none.csv"), ("none.csv", "cannot be read")),
    (("check", "."), ("cannot be read",)),
    (("check", "none.csv", "--group", "4"), ("--group", "without --as")),
    (("check", "none.csv", "--as", "interleaved", "--chunks", "0"), ("--chunks", "'0'")),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD, ids=[" ".join(case[0])[:60] for case in BAD])
def test_bad_input_is_one_sentence_and_status_2(
    arguments: tuple[str, ...], fragments: tuple[str, ...], run: Run
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("refimpl: ")
    assert err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("1f1b",), ("1f1b", "--ranks", "3"), ("compare", *SIZE), ("check",)]
)
def test_missing_arguments_are_status_2_with_the_usage(arguments: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: refimpl pipeline")


def test_a_picture_without_matplotlib_is_refused_before_anything(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run("1f1b", *SIZE, "--json", "a.json", "--plot", "a.svg")
    assert (status, out) == (2, "")
    assert "the extra plot" in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("form", ["csv", "json"])
@pytest.mark.parametrize("name", RULES)
def test_check_finds_every_schedule_legal(name: str, form: str, run: Run) -> None:
    run(name, *SIZE, f"--{form}", f"a.{form}")
    status, out, err = run("check", f"a.{form}")
    assert (status, err) == (0, "")
    assert "10 microbatches: legal" in out


@pytest.mark.parametrize(
    ("rows", "fragment"),
    [
        ("0F0,0F0,0B0\n1F0,1B0\n", "rank 0, position 1"),
        ("0F0\n1F0,1B0\n", "missing"),
        ("0B0,0F0\n1F0,1B0\n", "rank 0, position 0"),
        ("0F0,0W0,0I0\n1F0,1B0\n", "rank 0, position 1"),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1B1,1B0\n1F0\n", "rank 2"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "wait for each other"),
    ],
)
def test_check_names_what_is_wrong(rows: str, fragment: str, run: Run) -> None:
    Path("mine.csv").write_text(rows)
    status, out, err = run("check", "mine.csv")
    assert (status, err) == (1, "")
    assert fragment in out
    assert out.splitlines()[-1].endswith("not legal")


def test_check_prints_so_many_findings_and_counts_the_others(run: Run) -> None:
    Path("mine.csv").write_text("0F0\n" + ",".join(f"1F{m}" for m in range(30)) + "\n")
    status, out, _ = run("check", "mine.csv")
    lines = out.splitlines()
    assert status == 1
    assert len(lines) == 22
    assert lines[-2].startswith("and ")
    assert lines[-2].endswith(" more")


def test_check_says_that_communication_is_not_judged(run: Run) -> None:
    Path("mine.csv").write_text("0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1B0\n")
    status, out, _ = run("check", "mine.csv")
    assert status == 0
    assert out.splitlines()[0] == "2 actions of communication are left out; they are not judged."


@pytest.mark.parametrize("name", RULES)
def test_check_as_a_rule_recognises_its_order(name: str, run: Run) -> None:
    run(name, *SIZE, "--csv", "a.csv")
    status, out, err = run("check", "a.csv", "--as", name)
    assert (status, err) == (0, "")
    assert out.endswith(f"; its order is that of {name}\n")
    assert out.count("\n") == 1


def test_check_as_interleaved_takes_chunks_and_a_group(run: Run) -> None:
    run("interleaved", *SIZE, "--chunks", "3", "--group", "6", "--json", "a.json")
    own = ("check", "a.json", "--as", "interleaved", "--chunks", "3")
    assert run(*own, "--group", "6")[0] == 0
    status, out, _ = run(*own)  # groups of 5
    assert status == 1
    assert "F of stage 0 on microbatch 5, but interleaved has F of stage 4 on microbatch 0." in out


def test_check_as_a_rule_says_where_each_rank_first_differs(run: Run) -> None:
    run("dualpipe", "--ranks", "4", "--microbatches", "8", "--csv", "a.csv")
    rows = [row.split(",") for row in Path("a.csv").read_text().splitlines()]
    right = plan("dualpipe", 4, 8)
    rows[1][0], rows[1][1] = rows[1][1], rows[1][0]
    rows[2] = rows[2][:-1]
    Path("a.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    status, out, err = run("check", "a.csv", "--as", "dualpipe")
    assert (status, err) == (1, "")
    first, second = (said(entry) for entry in right.ranks[1][:2] if isinstance(entry, Action))
    last = right.ranks[2][-1]
    assert isinstance(last, Action)
    assert [line for line in out.splitlines() if "but dualpipe has" in line] == [
        f"rank 1, position 0: {second}, but dualpipe has {first}.",
        f"rank 2, position {len(right.ranks[2]) - 1}: nothing, but dualpipe has {said(last)}.",
    ]
    assert out.endswith(": not legal; its order is not that of dualpipe\n")


def test_check_as_another_rule_names_every_rank_although_it_is_legal(run: Run) -> None:
    run("1f1b", "--ranks", "32", "--microbatches", "40", "--csv", "a.csv")
    assert run("check", "a.csv")[0] == 0
    status, out, _ = run("check", "a.csv", "--as", "gpipe")
    lines = out.splitlines()
    assert status == 1
    assert lines[0] == (
        "rank 0, position 32: B of stage 0 on microbatch 0, but gpipe has F of stage 0 on microbatch 32."
    )
    assert lines[20:] == [
        "and 12 more",
        "a, 32 ranks, 40 microbatches: legal; receives to be posted ahead under rendezvous: 0; "
        "its order is not that of gpipe",
    ]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--as", "dualpipe"), ("even number of ranks", "3")),
        (("--as", "zb2p"), ("'zb2p' is no schedule", "dualpipev")),
        (("--as", "1f1b", "--chunks", "2"), ("1f1b", "chunks is 2")),
        (("--as", "interleaved", "--group", "7"), ("group size", "7")),
    ],
)
def test_check_as_a_rule_that_there_is_not_is_its_sentence_and_status_2(
    options: tuple[str, ...], fragments: tuple[str, ...], run: Run
) -> None:
    run("1f1b", "--ranks", "3", "--microbatches", "6", "--csv", "a.csv")
    status, out, err = run("check", "a.csv", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize("command", ["1f1b", "compare", "check"])
def test_help_says_that_only_interleaved_has_chunks_and_groups(command: str, run: Run) -> None:
    _, out, _ = run(command, "--help")
    words = " ".join(out.split())
    assert "stages of a rank; only interleaved takes it; default: 2" in words
    assert "microbatches that go together; only interleaved takes it" in words


@pytest.mark.parametrize("text", ["0F0,0Q0\n", "", '{"P": 2}', "[1]"])
def test_check_of_what_cannot_be_read_is_status_2(text: str, run: Run) -> None:
    Path("mine").write_text(text)
    status, out, err = run("check", "mine")
    assert (status, out) == (2, "")
    assert err.startswith("refimpl: mine")
    assert err.count("\n") == 1
