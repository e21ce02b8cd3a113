"""The safetensors container: 8 bytes of length, a JSON header, the tensors' bytes.  SPEC CKPT-1 to CKPT-3.

Opening a file reads its header only, and every number in it is checked before it is used: nothing that a file
declares makes us allocate more than the file holds.  A tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refimpl.checkpoint.atomic import replacing
from refimpl.checkpoint.dtypes import DTYPES, ORDER, OTHERS, Array, Stored
from refimpl.config.jsonfile import parse_object
from refimpl.errors import Invalid, Missing, Unreadable, Unsupported

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
_LARGEST_DIM = 1 << 48
_LARGEST_RANK = 32
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: dtype name, shape, and its bytes [begin, end) counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile(Mapping[str, Array]):
    """An open file, as a mapping from name to decoded array.  It holds the header, and no file handle."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def entry(self, name: str) -> Entry:
        """Raises Missing."""
        try:
            return self.entries[name]
        except KeyError:
            raise Missing(f"tensor {name} is not in {self.path}, but it must be there.") from None

    def dtype(self, name: str) -> str:
        return self.entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def codes(self, name: str) -> Array:
        """The stored array: BF16 as uint16, FP8 as uint8.  Raises Missing, Unreadable."""
        entry = self.entry(name)
        return self._read(name, entry, entry.begin, math.prod(entry.shape)).reshape(entry.shape)

    def slice(self, name: str, start: int, count: int) -> Array:
        """Elements start to start + count - 1 in C order, decoded; only they are read."""
        entry = self.entry(name)
        size = math.prod(entry.shape)
        if not 0 <= start <= start + count <= size:
            raise Invalid(f"slice {start}:{start + count} of tensor {name} must lie in its {size} elements.")
        dtype = DTYPES[entry.dtype]
        codes = self._read(name, entry, entry.begin + start * dtype.codes.itemsize, count)
        return dtype.decode(codes)

    def __getitem__(self, name: str) -> Array:
        """Decoded exactly, BF16 and FP8 to float32.  Raises Missing, Unreadable."""
        return DTYPES[self.dtype(name)].decode(self.codes(name))

    value = __getitem__

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # the default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _read(self, name: str, entry: Entry, begin: int, count: int) -> Array:
        codes = np.empty(count, DTYPES[entry.dtype].codes)
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                got = file.readinto(codes.view(np.uint8).data) if count else 0
        except OSError as error:
            raise Unreadable(
                f"{self.path} cannot be read ({error.strerror}), but it must be readable."
            ) from None
        if got != codes.nbytes:
            raise Unreadable(
                f"{self.path} ends in tensor {name}, but it must be as long as when it was opened."
            )
        if entry.dtype == "BOOL" and (codes.view(np.uint8) > 1).any():
            raise Unreadable(f"{self.path}: tensor {name} has a BOOL that is not 0 or 1, but each must be.")
        return codes


def open_file(path: str | PathLike[str]) -> TensorFile:
    """Read and check the header.  Raises Unreadable, and Unsupported for a dtype that is not read here."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, size)
    except OSError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(
            f"{path} cannot be read ({error.strerror}), but it must be a safetensors file."
        ) from None
    return _check(path, parse_object(header, f"the header of {path}"), 8 + len(header), size)


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    if size < 10:
        raise Unreadable(f"{path} has {size} bytes, but a safetensors file must have a length and a header.")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise Unreadable(
            f"{path} declares a header of {length} bytes, "
            f"but it must have 2 to {HEADER_LIMIT} that fit in the file ({size} bytes)."
        )
    header = file.read(length)
    if len(header) != length or header[:1] != b"{":
        raise Unreadable(
            f"{path} has a header that begins with {header[:1]!r}, but it must be a JSON object."
        )
    return header


def _check(path: Path, header: dict[str, Any], start: int, size: int) -> TensorFile:
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Unreadable(f"{path} has a {_METADATA} that is not from text to text, but it must be.")
    entries = {name: _entry(f"{path}: tensor {name[:80]}", given, start) for name, given in header.items()}
    end, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a hole after"
            raise Unreadable(
                f"{path}: tensor {name[:80]} {what} {before}, but bytes must follow without gaps."
            )
        end, before = entry.end, f"tensor {name[:80]}"
    if end != size:
        raise Unreadable(f"{path} has {size} bytes, but by its header it must have {end}.")
    return TensorFile(path, entries, metadata)


def _entry(what: str, given: Any, start: int) -> Entry:
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(
            f"{what} has a malformed entry, but it must have dtype, shape and data_offsets only."
        )
    name, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        kind = Unsupported if isinstance(name, str) and name in OTHERS else Unreadable
        raise kind(f"{what} has dtype {str(name)[:40]}, but it must be one of {', '.join(DTYPES)}.")
    if not _naturals(shape) or len(shape) > _LARGEST_RANK or any(dim > _LARGEST_DIM for dim in shape):
        raise Unreadable(
            f"{what} has shape {str(shape)[:80]}, "
            f"but it must be at most {_LARGEST_RANK} integers from 0 to {_LARGEST_DIM}."
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Unreadable(
            f"{what} has data_offsets {str(offsets)[:80]}, but they must be two rising integers."
        )
    required = math.prod(shape) * DTYPES[name].codes.itemsize
    if math.prod(max(dim, 1) for dim in shape) > 1 << 59:
        raise Unreadable(f"{what} has shape {shape}, but an array must have fewer than 2^59 elements.")
    if offsets[1] - offsets[0] != required:
        raise Unreadable(
            f"{what} has {offsets[1] - offsets[0]} bytes, but {name} {shape} must have {required}."
        )
    return Entry(name, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def write(
    path: str | PathLike[str],
    tensors: Mapping[str, Array | Stored],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file, whole or not at all, with the same bytes for the same tensors.

    Arrays are written in their own type; bf16 and FP8 as `Stored` codes.  The order is that of the format's
    own writer.  metadata has at most one key, since the format gives its keys no order.

    Raises Invalid, Unsupported (what cannot be stored), Unreadable (what cannot be written).
    """
    if metadata is not None and len(metadata) > 1:
        raise Invalid(f"metadata of {path} has {len(metadata)} keys, but it must have at most one.")
    stored = {
        name: array if isinstance(array, Stored) else Stored.of(np.asarray(array), f"tensor {name}")
        for name, array in tensors.items()
    }
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in stored:
        if not isinstance(name, str) or name == _METADATA:
            raise Invalid(f"a tensor has the name {name!r}, but it must be text other than {_METADATA}.")
        if stored[name].dtype not in DTYPES:
            stored[name].get(f"tensor {name}")
    order = sorted(stored, key=lambda name: (ORDER[stored[name].dtype], name.encode()))
    for name in order:
        item = stored[name]
        begin, end = end, end + math.prod(item.shape) * DTYPES[item.dtype].codes.itemsize
        header[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(stored[name].get(f"tensor {name}").data)
