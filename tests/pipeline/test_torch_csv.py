"""PyTorch's CSV form, written and read.  SPEC PIPE-42."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_orders import orders, recorded
from support import one_sentence

from refimpl.errors import Error, Invalid
from refimpl.pipeline import exchange, torch_csv
from refimpl.pipeline.rules import plan
from refimpl.pipeline.schedule import Action, Pair, Schedule

F, B = Action("F", 0, 1), Action("B", 7, 0)
BY_HAND = Schedule("x", 2, 8, ((0, 7), (3,)), ((F, Pair(F, B), B), (Action("I", 3, 2), Action("W", 3, 2))))


def read(folder: Path, text: str) -> exchange.Given:
    path = folder / "mine.csv"
    path.write_text(text, newline="")
    return exchange.read(path)


def test_cells_by_hand() -> None:
    assert torch_csv.text(BY_HAND) == "0F1,(0F1;7B0)OVERLAP_F_B,7B0\r\n3I2,3W2\r\n"


def test_stages_microbatches_and_placement_are_those_that_occur(tmp_path: Path) -> None:
    found = read(tmp_path, torch_csv.text(BY_HAND)).schedule
    assert found.ranks == BY_HAND.ranks
    assert (found.stages, found.microbatches, found.placement) == (8, 3, ((0, 7), (3,)))


@pytest.mark.parametrize("name", [name for name in orders() if "_P4_M10_" in name])
def test_recorded_orders_come_back(name: str, tmp_path: Path) -> None:
    schedule = recorded(name)
    found, left_out = read(tmp_path, torch_csv.text(schedule))
    assert (found.ranks, found.stages, found.microbatches, left_out) == (
        schedule.ranks,
        schedule.stages,
        schedule.microbatches,
        0,
    )
    assert [set(own) for own in found.placement] == [set(own) for own in schedule.placement]


def test_communication_is_counted_and_left_out(tmp_path: Path) -> None:
    text = "0UNSHARD,0F0,0SEND_F0,,0RECV_B0,0B0,0RESHARD,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0\n"
    found, left_out = read(tmp_path, text)
    assert left_out == 7
    assert found.ranks == plan("gpipe", 2, 1).ranks


@pytest.mark.parametrize(
    "text",
    [
        "0F0,0B0\n1F0,1B0",
        "0F0,0B0\r\n1F0,1B0\r\n\r\n\n",
        "\ufeff 0F0 , 0B0\n,1F0,,1B0,\n",
        '"0F0","0B0"\n1F0,1B0\n',
    ],
)
def test_blanks_quotes_and_empty_cells_mean_nothing(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text).schedule.ranks == plan("gpipe", 2, 1).ranks


def test_an_empty_row_between_others_is_a_rank(tmp_path: Path) -> None:
    assert [len(own) for own in read(tmp_path, "0F0,0B0\n\n1F0,1B0\n").schedule.ranks] == [2, 0, 2]


def test_either_half_of_a_pair_may_come_first(tmp_path: Path) -> None:
    both = [read(tmp_path, f"({cell})OVERLAP_F_B\n").schedule for cell in ("0F1;7B0", "7B0; 0F1")]
    assert both[0].ranks == both[1].ranks == ((Pair(F, B),),)


@pytest.mark.parametrize(
    "cell",
    [
        "0f1",
        "F1",
        "0F",
        "0F1x",
        "-1F1",
        "0F-1",
        "0X1",
        "0F1.0",
        "٣F1",
        "12345678F1",
        "0FB1",
        "(0F1)OVERLAP_F_B",
        "(0F1;7B0)OVERLAP",
        "(0F1;7B0;1F1)OVERLAP_F_B",
        "(0F1;7X0)OVERLAP_F_B",
        "0SEND_X1",
        "nonsense" * 100,
    ],
)
def test_another_cell_is_refused_with_its_place(cell: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        read(tmp_path, f"0F0,0B0\n1F0,{cell},1B0\n")
    one_sentence(caught, "mine.csv", "row 2, cell 2", "0F1", repr(cell[:40]))


@pytest.mark.parametrize("cell", ["(0F1;7F0)OVERLAP_F_B", "(0F1;7I0)OVERLAP_F_B", "(0B1;7B0)OVERLAP_F_B"])
def test_a_pair_of_something_else_is_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        read(tmp_path, cell)
    one_sentence(caught, "row 1, cell 1", "an F and a B")


@pytest.mark.parametrize("data", [b"", b"\n\n", b",,\n", b"0UNSHARD\n", b"\xff0F0\n", b'"0F0\n', b"0F0\0\n"])
def test_other_bytes_are_one_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(data)
    with pytest.raises(Error) as caught:
        exchange.read(path)
    one_sentence(caught, "mine.csv")
