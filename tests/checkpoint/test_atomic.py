"""A file is there whole or not at all.  SPEC CKPT-7."""

import errno
import os

import numpy as np
import pytest

from refimpl.checkpoint import Stored, write
from refimpl.checkpoint.atomic import replacing, write_bytes
from refimpl.errors import Unreadable


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_whatever_interrupts_leaves_the_old_file_and_nothing_else(tmp_path, what):
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def interrupted():
        raise what

    with pytest.raises(what):
        write(path, {"x": np.zeros(1000), "y": Stored("F32", (2,), interrupted)})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a"

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        Unreadable, match=r"a cannot be written \(No space left on device\), but it must be .*\."
    ):
        write(path, {"x": np.zeros(4)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(Unreadable, match="cannot be written"):
        write_bytes(tmp_path / "no" / "a", b"")


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(Unreadable, match="cannot be written"):
        write_bytes(tmp_path / "a", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
