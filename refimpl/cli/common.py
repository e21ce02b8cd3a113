"""What the commands share: exit statuses, arguments, progress."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from refimpl.checkpoint.atomic import write_bytes
from refimpl.errors import Invalid

HOLDS, FAILS, UNTRIED, INTERRUPTED = 0, 1, 2, 130
COMMITTED: Final = "golden"  # where a clone has its vectors
GENERATED: Final = "build/golden"

Commands = argparse._SubParsersAction  # argparse has no public name for it


def folder(given: Path | None) -> Path:
    if given is not None:
        return given
    if Path(COMMITTED).is_dir():
        return Path(COMMITTED)
    raise Invalid(f"there is no folder {COMMITTED} here; the folder of cases has to be named.")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def natural(text: str) -> int | None:
    """The number from 0 on that a text of at most 20 decimal digits is; None for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def count(text: str) -> int:
    value = natural(text)
    if value is None or not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 1 on")
    return value


def jobs(text: str) -> int:
    value = natural(text)
    if value is None or not 1 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of processes from 1 on")
    return value


def write_json(file: Path, value: Any) -> None:
    """JSON to a file, whole or not at all; - is standard output.  Raises Unreadable."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    if str(file) == "-":
        print(text, end="")
    else:
        write_bytes(file, text.encode())


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, after two seconds and only where it is a terminal."""
    with tqdm(total=total, desc=what, delay=2, disable=None, file=sys.stderr, leave=False) as bar:
        start = time.monotonic()

        def done(id: str) -> None:
            if time.monotonic() - start > 2:
                bar.set_postfix_str(id, refresh=False)
            bar.update()

        yield done
