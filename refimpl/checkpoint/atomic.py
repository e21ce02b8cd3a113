"""Files that are there whole or not at all.  SPEC CKPT-7.

Written under a temporary name in the same folder, synced, and renamed; whatever goes wrong before that (a
full disk, Ctrl-C) removes the temporary file.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from refimpl.errors import Unreadable


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well.  Raises Unreadable if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, Unreadable):
            raise
        reason = error.strerror or type(error).__name__
        raise Unreadable(
            f"{path} cannot be written ({reason}), but it must be in a writable folder."
        ) from error


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write a small file.  Raises Unreadable."""
    with replacing(path) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a power cut; some file systems cannot, and then it is not needed."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
