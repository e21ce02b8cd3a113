"""JSON from files that others wrote: strict, and bounded before anything is allocated.  SPEC CONF-1."""

import json
import os
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

from refimpl.errors import Invalid, Unreadable

LIMIT = 1 << 20  # bytes; the published config.json has about 2 KiB


class _RefusedError(Exception):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise _RefusedError(f'has the key "{twice[:60]}" twice, but each key must occur once')
    return found


def _constant(text: str) -> float:
    raise _RefusedError(f"has the literal {text}, but JSON numbers must be finite")


def _number(text: str) -> float:
    number = float(text)
    if number - number != 0.0:
        raise _RefusedError(f"has the number {text[:40]}, but numbers must fit a double")
    return number


def _encodable(found: Any) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in messages.

    Raises Unreadable for what is not strict UTF-8 JSON (duplicate keys and NaN are not), Invalid for what is
    not an object.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{what} has a byte at {error.start} that is not UTF-8, but it must be UTF-8."
        ) from None
    try:
        found = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_number)
    except _RefusedError as refusal:
        raise Unreadable(f"{what} {refusal}.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Unreadable(
            f"{what} is not JSON at {where} ({error.msg}), but it must be a JSON object."
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise Unreadable(
            f"{what} cannot be read as JSON ({str(error)[:60]}), but it must be plain JSON."
        ) from None
    if "\\ud" in text.lower() and not _encodable(found):
        raise Unreadable(f"{what} has half a surrogate pair in a text, but its texts must be Unicode.")
    if not isinstance(found, dict):
        raise Invalid(f"{what} holds a JSON {type(found).__name__}, but it must be a JSON object.")
    return found


def read_object(path: str | PathLike[str], limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.  Raises as `parse_object`, and Unreadable."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)  # reading makes room for what is asked
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror}), but it must be a JSON file.") from None
    if max(size, len(data)) > limit:
        raise Unreadable(f"{path} is larger than {limit} bytes, but it must be at most that.")
    return parse_object(data, str(path))
